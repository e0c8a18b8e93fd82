// The product of two FP8 matrices on a CPU with dot products of bf16 pairs (AVX512-BF16): codes in, results out.
//
// y[i][j] = (sum over k of a[i][k] b[k][j]) * (scale_a[i] * scale_b[j]) + bias[j], summed in fp32 and rounded once.
//
// FP8 values and their products are exact in bf16 and fp32. b is decoded once, into bf16 panels as wide as a tile; a, in
// blocks that stay in the cache; no unscaled product goes through memory. After kDepth terms a sum begins anew, and the
// parts are added: a long sum (a weight's gradient) rounds less.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "numerics.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int64_t kRows = 6, kColumns = 64;  // of a tile: 24 of 32 registers hold its sums, 4 a row of b
constexpr int64_t kBlock = 16 * kRows;       // rows of a that are decoded at once
constexpr int64_t kDepth = 512;              // terms that are summed without a break
constexpr int64_t kVector = 32;              // bf16 numbers in a register

struct Matrix {
    const uint8_t* codes;
    int64_t row, column;  // strides, one of which is 1
    const uint16_t* levels;  // the bf16 numbers that the codes 0 to 127 stand for; the eighth bit is the sign
};

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

class Decoder {
public:
    explicit Decoder(const uint16_t* levels) {
        for (int i = 0; i < 4; ++i) levels_[i] = _mm512_loadu_si512(levels + i * kVector);
    }

    // `count` of 32 codes as bf16, and zeros.
    __m512i operator()(const uint8_t* codes, int64_t count) const {
        const __mmask32 mask = count >= kVector ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
        const __m512i code = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, codes));
        const __m512i low = _mm512_permutex2var_epi16(levels_[0], code, levels_[1]);
        const __m512i high = _mm512_permutex2var_epi16(levels_[2], code, levels_[3]);
        const __mmask32 is_high = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
        const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
        return _mm512_or_si512(_mm512_mask_blend_epi16(is_high, low, high), sign);
    }

private:
    __m512i levels_[4];
};

// Lines along the sum, `lines` of `count`, become pairs[line][k / 2].
void decode_lines(const Matrix& x, int64_t stride, int64_t lines, int64_t count, uint32_t* pairs, int64_t depth) {
    const Decoder decode(x.levels);
    for (int64_t i = 0; i < lines; ++i)
        for (int64_t k = 0; k < depth; k += kVector)
            _mm512_storeu_si512(pairs + (i * depth + k) / 2, decode(x.codes + i * stride + k, count - k));
}

// Lines across the sum, `count` of `width`, become pairs[k / 2][line's place].
void decode_across(const Matrix& x, int64_t stride, int64_t width, int64_t count, uint32_t* pairs, int64_t room) {
    const Decoder decode(x.levels);
    alignas(64) uint16_t order[2 * kVector];
    for (int i = 0; i < kVector; ++i) {
        order[2 * i] = uint16_t(i);
        order[2 * i + 1] = uint16_t(i + kVector);
    }
    const __m512i first = _mm512_load_si512(order), second = _mm512_load_si512(order + kVector);
    for (int64_t k = 0; k < count; k += 2)
        for (int64_t j = 0; j < room; j += kVector) {
            const uint8_t* codes = x.codes + k * stride + j;
            const __m512i even = decode(codes, width - j);
            const __m512i odd = decode(codes + stride, k + 1 < count ? width - j : 0);
            uint32_t* to = pairs + k / 2 * room + j;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, first, odd));
            _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, second, odd));
        }
}

// A panel of b, `width` columns, as pairs[k / 2][column].
void decode_panel(const Matrix& b, int64_t width, int64_t count, uint32_t* pairs) {
    if (b.column == 1) {
        decode_across(b, b.row, width, count, pairs, kColumns);
        return;
    }
    const Decoder decode(b.levels);
    alignas(64) uint32_t part[16][16];
    for (int64_t k = 0; k < count; k += kVector)
        for (int64_t j = 0; j < kColumns; j += 16) {
            for (int64_t i = 0; i < 16; ++i)
                _mm512_store_si512(part[i], decode(b.codes + (j + i) * b.column + k, j + i < width ? count - k : 0));
            const int64_t depth = std::min<int64_t>(16, (count - k + 1) / 2);
            for (int64_t p = 0; p < depth; ++p)
                for (int64_t i = 0; i < 16; ++i) pairs[(k / 2 + p) * kColumns + j + i] = part[i][p];
        }
}

// Adds to `sums` the products of `depth` pairs of kRows rows of a, whose pairs lie `row` and `pair` apart.
void multiply(const uint32_t* a, int64_t row, int64_t pair, const uint32_t* b, int64_t depth, float* sums) {
    __m512 sum[kRows][4];
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_ps();
    for (int64_t p = 0; p < depth; ++p) {
        __m512bh columns[4];
        for (int j = 0; j < 4; ++j) columns[j] = bits<__m512bh>(_mm512_loadu_si512(b + p * kColumns + j * 16));
        for (int i = 0; i < kRows; ++i) {
            const __m512bh both = bits<__m512bh>(_mm512_set1_epi32(int(a[i * row + p * pair])));
            for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], both, columns[j]);
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < 4; ++j) {
            float* to = sums + i * kColumns + j * 16;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i][j]));
        }
}

uint16_t nearest_bf16(float x) {
    const uint32_t encoding = bits<uint32_t>(x), rounded = encoding + 0x7FFFu + ((encoding >> 16) & 1);
    return uint16_t((encoding & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded >> 16);
}

void store(float x, float* to) { *to = x; }
void store(float x, uint16_t* to) { *to = nearest_bf16(x); }

template <class Y>
void finish(const float* sums, float scale_a, const float* scale_b, bool by_column, const float* bias, Y* y,
            int64_t width) {
    for (int64_t j = 0; j < width; ++j) {
        const float product = sums[j] * (scale_a * scale_b[by_column ? j : 0]);
        store(bias ? product + bias[j] : product, y + j);
    }
}

template <class Y>
void gemm(const Matrix& a, const Matrix& b, const float* scale_a, bool by_row, const float* scale_b, bool by_column,
          const float* bias, Y* y, int64_t m, int64_t n, int64_t k, int32_t threads) {
    const int64_t depth = round_up(k, kVector), panels = round_up(n, kColumns) / kColumns, panel = depth / 2 * kColumns;
    std::vector<uint32_t> b_pairs(size_t(panels * panel));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < panels; ++i) {
        const Matrix part{b.codes + i * kColumns * b.column, b.row, b.column, b.levels};
        decode_panel(part, std::min(kColumns, n - i * kColumns), k, b_pairs.data() + i * panel);
    }
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < m; first += kBlock) {
        const int64_t rows = std::min(kBlock, m - first);
        const Matrix block{a.codes + first * a.row, a.row, a.column, a.levels};
        std::vector<uint32_t> a_pairs(size_t(kBlock * depth / 2));
        const bool across = a.column != 1;
        if (across)
            decode_across(block, a.column, rows, k, a_pairs.data(), kBlock);
        else
            decode_lines(block, a.row, rows, k, a_pairs.data(), depth);
        const int64_t row = across ? 1 : depth / 2, pair = across ? kBlock : 1;
        for (int64_t j = 0; j < n; j += kColumns)
            for (int64_t i = 0; i < rows; i += kRows) {
                alignas(64) float sums[kRows * kColumns] = {};
                for (int64_t p = 0; p < (k + 1) / 2; p += kDepth / 2)
                    multiply(a_pairs.data() + i * row + p * pair, row, pair, b_pairs.data() + j / kColumns * panel +
                             p * kColumns, std::min(kDepth / 2, (k + 1) / 2 - p), sums);
                for (int64_t r = i; r < std::min(rows, i + kRows); ++r)
                    finish(sums + (r - i) * kColumns, scale_a[by_row ? first + r : 0], scale_b + (by_column ? j : 0),
                           by_column, bias ? bias + j : nullptr, y + (first + r) * n + j, std::min(kColumns, n - j));
            }
    }
}

}  // namespace
#endif

// Whether this machine has the instructions.
extern "C" int32_t fp8_gemm_runs() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512BF16__
// One stride of each matrix is 1. `by_row` and `by_column` say whether there is a scale for each row of a and column of
// b; `bias` may be null; y is contiguous, bf16 or fp32.
extern "C" void fp8_gemm(const uint8_t* a, int64_t a_row, int64_t a_column, const uint16_t* a_levels, const uint8_t* b,
                         int64_t b_row, int64_t b_column, const uint16_t* b_levels, const float* scale_a,
                         int32_t by_row, const float* scale_b, int32_t by_column, const float* bias, void* y,
                         int32_t bf16, int64_t m, int64_t n, int64_t k, int32_t threads) {
    const Matrix left{a, a_row, a_column, a_levels}, right{b, b_row, b_column, b_levels};
    if (bf16)
        gemm(left, right, scale_a, by_row, scale_b, by_column, bias, static_cast<uint16_t*>(y), m, n, k, threads);
    else
        gemm(left, right, scale_a, by_row, scale_b, by_column, bias, static_cast<float*>(y), m, n, k, threads);
}
#endif
