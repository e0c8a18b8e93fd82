// The step of FP8AdamW on one parameter, on a CPU: a block at a time, in a cache, every loop one that compilers make
// vectors of.
//
// What bounds it is not memory but the length of a loop's chain of operations: a processor looks a few hundred
// instructions ahead, and a polynomial is as many cycles long. So the loops are short, many, and of 32-bit numbers;
// what they hand on to each other lies in the first cache. Loops that divide also hash, which keeps other units busy.
//
// It does what `optim/step.py` does with moments "fp8", operation by operation in the same order, so that all results
// are the same to the last bit; its arithmetic is in `numerics.h`, and what the formulas mean is said in Python. It has
// to be compiled without contraction of floating-point expressions.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "numerics.h"

// What one call works on; `kernels/adamw.py` has the same fields in the same order.
struct Task {
    void* weight;  // bf16 or fp32 [rows, columns], as are the gradients
    const void* grad;
    uint8_t* m_codes;
    uint8_t* m_scale;
    uint8_t* v_codes;
    float* v_max;
    uint8_t* v_density;
    uint8_t* v_split;
    uint8_t* v_gap;
    const int32_t* whole_rows;  // the number of each row in the whole parameter
    const float* m_levels;      // what the 256 codes of m stand for
    int64_t rows, columns, block_size;
    int32_t first_column, key0, key1, step;
    float beta1, rest1, beta2, rest2, eps, shrink, lr, grad_factor, max_update, m_correction, v_correction;
    int32_t bf16_weight, bf16_grad, threads;
    float* counts;  // the fields of `optim.health.Counts`, to be added to, or null
};

namespace {

constexpr int64_t kBlock = 128;  // loops over as many elements have no remainders

// `step` is `mix`ed.
inline RowKey row_key(const Task& t, uint32_t step, uint32_t row) {
    const uint32_t first = mix(mix(uint32_t(t.key0) ^ step, uint32_t(t.key1)) ^ row);
    return {first, mix(first ^ uint32_t(t.key1), row)};
}

inline void store(uint16_t* p, int64_t i, float exact, uint32_t random) { p[i] = stochastic_bf16(exact, random); }
inline void store(float* p, int64_t i, float exact, uint32_t) { p[i] = exact; }

// Numbers of a block or a tile, at the beginning of a cache line: a vector that crosses one takes twice as long.
struct Scratch {
    struct alignas(64) Line {
        float numbers[16];
    };
    std::vector<Line> lines;

    explicit Scratch(int64_t count) : lines(size_t(count + 15) / 16) {}
    float* at(int64_t i) { return lines.data()->numbers + i; }
};

// What `optim/health.py` counts, in its order.
struct Counted {
    int64_t positive = 0, at_floor = 0;
    float max_update = 0;
    double squared_updates = 0;
    int64_t to_move = 0, stayed = 0;

    void add(const Counted& other) {
        positive += other.positive, at_floor += other.at_floor;
        max_update = std::max(max_update, other.max_update);
        squared_updates += other.squared_updates;
        to_move += other.to_move, stayed += other.stayed;
    }

    void add_to(float* counts) const {
        counts[0] += float(positive), counts[1] += float(at_floor);
        counts[2] = std::max(counts[2], max_update);
        counts[3] += float(squared_updates);
        counts[4] += float(to_move), counts[5] += float(stayed);
    }
};

// The state of a step between its stages, each of which goes through all blocks of the tile; what belongs to a block is
// computed between them for all blocks at once.
struct Tile {
    const int64_t stride;
    Scratch m, v, a, b;  // moments of all blocks; two for what loops hand on
    int64_t start[kTile], length[kTile], count;
    uint32_t column[kTile];
    int32_t row[kTile], density[kTile], middle[kTile], hi_bits[kTile], lo_bits[kTile], over[kTile], under[kTile],
        exponent[kTile];
    float unit[kTile], stretch[kTile], slack[kTile], spread[kTile], low_base[kTile];
    RowKey weight_key[kTile], dither_key[kTile];
    Lattices old, fresh;
    Counted counted;

    explicit Tile(int64_t block_size)
        : stride((block_size + 15) / 16 * 16), m(kTile * stride), v(kTile * stride), a(stride), b(stride) {}
};

// Where the blocks of a tile are, their random keys and what was stored of them; blocks are counted through the rows.
void begin(const Task& t, Tile& tile, int64_t first) {
    const int64_t blocks = (t.columns + t.block_size - 1) / t.block_size;
    tile.count = std::min(kTile, t.rows * blocks - first);
    for (int64_t i = 0; i < kTile; ++i) {
        const int64_t scale = first + std::min(i, tile.count - 1), row = scale / blocks;
        const int64_t column = (scale - row * blocks) * t.block_size;
        tile.start[i] = row * t.columns + column;
        tile.length[i] = std::min(t.block_size, t.columns - column);
        tile.column[i] = uint32_t(t.first_column + column);
        tile.row[i] = t.whole_rows[row];
        tile.unit[i] = as_float(int32_t(t.m_scale[scale]) << 23);
        tile.density[i] = t.v_density[scale];
        tile.old.hi[i] = t.v_max[scale];
        tile.old.split[i] = t.v_split[scale];
        tile.old.gap[i] = t.v_gap[scale];
    }
    const uint32_t step = mix(uint32_t(t.step)), epoch = mix(uint32_t(t.step >> 10) ^ kDither);
    for (int64_t i = 0; i < kTile; ++i) tile.weight_key[i] = row_key(t, step, uint32_t(tile.row[i]));
    for (int64_t i = 0; i < kTile; ++i) tile.dither_key[i] = row_key(t, epoch, uint32_t(tile.row[i]));
    tile.old.compute(tile.density);
}

// Asks for the block that lies `ahead` elements further: of a block, each stage reads a few lines and then no more,
// which is too little for the processor to see a pattern. There may be no such block, and asking does no harm: hence a
// number and no pointer.
template <class T>
inline void prefetch(const T* block, int64_t ahead, int64_t count) {
    const uintptr_t first = uintptr_t(block) + uintptr_t(ahead) * sizeof(T);
    for (uintptr_t i = 0; i < uintptr_t(count) * sizeof(T); i += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(first + i), 1);
}

// What the codes of m stand for, in units of its scale and of the root of v; the lattice points of v; the gradient.
template <class Weight, class Grad, class Count>
void expand(const Task& t, Tile& tile, int64_t i, Count n) {
    const uint8_t* __restrict m_codes = t.m_codes + tile.start[i];
    const uint8_t* __restrict v_codes = t.v_codes + tile.start[i];
    const Grad* __restrict grad = static_cast<const Grad*>(t.grad) + tile.start[i];
    const float* __restrict levels = t.m_levels;
    const Weight* weight = static_cast<const Weight*>(t.weight) + tile.start[i];
    float *__restrict m = tile.m.at(i * tile.stride), *__restrict point = tile.a.at(0), *__restrict g = tile.b.at(0);
    const float factor = t.grad_factor;
    const int64_t ahead = kTile * t.block_size;  // where the next tile has its block, unless rows end in between
    prefetch(m_codes, ahead, n);
    prefetch(v_codes, ahead, n);
    prefetch(grad, ahead, n);
    prefetch(weight, ahead, n);
    int32_t found = 0;
    for (; found + 4 <= n; found += 4) {  // no vectors here, so that a loop a number costs as much as the number
        const float level0 = levels[m_codes[found]], level1 = levels[m_codes[found + 1]];
        const float level2 = levels[m_codes[found + 2]], level3 = levels[m_codes[found + 3]];
        m[found] = level0, m[found + 1] = level1, m[found + 2] = level2, m[found + 3] = level3;
    }
    for (; found < n; ++found) m[found] = levels[m_codes[found]];
    for (int32_t j = 0; j < n; ++j) point[j] = float(int32_t(uint8_t(v_codes[j] + (v_codes[j] > 253))) - 253);
    for (int32_t j = 0; j < n; ++j) g[j] = load(grad, j) * factor;
}

// The new moments of block `i`, and their range.
template <class Count>
void decode(const Task& t, Tile& tile, int64_t i, Count n) {
    const float *__restrict point = tile.a.at(0), *__restrict grad = tile.b.at(0);
    float *__restrict m = tile.m.at(i * tile.stride), *__restrict v = tile.v.at(i * tile.stride);
    const Lattice old = tile.old[i];
    const float unit = tile.unit[i], beta1 = t.beta1, rest1 = t.rest1, beta2 = t.beta2, rest2 = t.rest2;
    int32_t hi = INT32_MIN;  // above the smallest normal number, as below
    uint32_t lo = kHugeBits - kTinyBits;
    for (int32_t j = 0; j < n; ++j) {
        const float g = grad[j], root = old.root(point[j]);
        const float old_v = point[j] > -253.0f ? least_positive(root * root, old.hi) : 0.0f;
        const float new_v = old_v * beta2 + (g * g) * rest2;
        m[j] = ((m[j] * unit) * least_positive(root, old.root_hi)) * beta1 + g * rest1;
        v[j] = new_v;
        const int32_t above = as_int(new_v) - kTinyBits;
        hi = std::max(hi, above);
        lo = std::min(lo, uint32_t(above));  // what is below is a huge number without a sign
    }
    tile.hi_bits[i] = hi + kTinyBits;
    tile.lo_bits[i] = int32_t(lo) + kTinyBits;
    tile.middle[i] = (std::max(tile.hi_bits[i], kTinyBits) >> 1) + (tile.lo_bits[i] >> 1);
}

// The weights of block `i`, and its second moments on either side of the middle.
template <class Weight, bool kCounts, class Count>
void update(const Task& t, Tile& tile, int64_t i, Count n) {
    Weight* __restrict weight = static_cast<Weight*>(t.weight) + tile.start[i];
    const float *__restrict m = tile.m.at(i * tile.stride), *__restrict v = tile.v.at(i * tile.stride);
    float *__restrict update = tile.a.at(0), *__restrict random = tile.b.at(0);
    const RowKey key = tile.weight_key[i];
    const uint32_t column = tile.column[i], middle = uint32_t(tile.middle[i]);
    const float m_correction = t.m_correction, v_correction = t.v_correction, eps = t.eps, lr = t.lr;
    const float shrink = t.shrink, limit = t.max_update;
    uint32_t over = uint32_t(kHugeBits) - middle, under = middle - 1;  // how far from the middle
    for (int32_t j = 0; j < n; ++j) {
        const float u = (m[j] * m_correction) / (std::sqrt(v[j] * v_correction) + eps);
        update[j] = std::min(std::max(u, -limit), limit);
        random[j] = as_float(int32_t(key.bits(column + uint32_t(j))));
        const uint32_t above = bits<uint32_t>(v[j]) - middle;
        over = std::min(over, above);
        under = std::min(under, ~above);
    }
    int32_t to_move = 0, moved = 0, largest = 0;
    float squares = 0;
    if (kCounts) {
#pragma omp simd reduction(+ : squares) reduction(max : largest)
        for (int32_t j = 0; j < n; ++j) {
            squares += update[j] * update[j];
            largest = std::max(largest, as_int(update[j]) & 0x7FFFFFFF);
        }
    }
    for (int32_t j = 0; j < n; ++j) {
        const float before = load(weight, j), exact = before * shrink - update[j] * lr;
        store(weight, j, exact, bits<uint32_t>(random[j]));
        if (kCounts) {
            to_move += exact != before;
            moved += exact != before && load(weight, j) != before;
        }
    }
    if (kCounts) {
        tile.counted.max_update = std::max(tile.counted.max_update, as_float(largest));
        tile.counted.squared_updates += double(squares);
        tile.counted.to_move += to_move;
        tile.counted.stayed += to_move - moved;
    }
    tile.over[i] = int32_t(middle + over);
    tile.under[i] = int32_t(middle - 1 - under);
}

// The lattices of the new second moments.
void choose(Tile& tile) {
    float split[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
        const float hi = as_float(std::max(tile.hi_bits[i], kTinyBits));
        const float gap = gap_of(hi, as_float(tile.over[i]), as_float(tile.under[i]));
        tile.fresh.hi[i] = tile.hi_bits[i] < kTinyBits ? 0.0f : hi;
        tile.fresh.gap[i] = gap;
        tile.density[i] = density_of(hi, as_float(tile.lo_bits[i]), gap);
    }
    tile.fresh.compute(tile.density);
    for (int64_t i = 0; i < kTile; ++i) {
        const float k = tile.fresh.k[i], base = tile.fresh.base[i], gap = tile.fresh.gap[i];
        tile.stretch[i] = 1.0f / lattice_point(std::max(tile.hi_bits[i], kTinyBits), k, base);
        tile.slack[i] = k * 0x1p-19f + 0x1p-16f;
        tile.spread[i] = (1.0f - 2.0f * tile.slack[i]) * 0x1p-16f;
        tile.low_base[i] = base - 2.0f * k * gap;
        const float over = std::floor(lattice_point(tile.over[i], k, base));
        split[i] = (std::min(std::max(over, -252.0f), 1.0f) + 253.0f) * std::min(gap, 1.0f);
    }
    std::copy(split, split + kTile, tile.fresh.split);
}

// Encodes the second moments of block `i`, and leaves the first ones in units of the root of what is stored.
template <bool kCounts, class Count>
void encode_v(const Task& t, Tile& tile, int64_t i, Count n) {
    uint8_t* __restrict codes = t.v_codes + tile.start[i];
    const float* __restrict v = tile.v.at(i * tile.stride);
    float *__restrict m = tile.m.at(i * tile.stride), *__restrict point = tile.a.at(0);
    const Lattice lattice = tile.fresh[i];
    const RowKey key = tile.dither_key[i];
    const uint32_t column = tile.column[i], turn = uint32_t(t.step) * kGolden;
    const float stretch = tile.stretch[i], slack = tile.slack[i], spread = tile.spread[i], low_base = tile.low_base[i];
    const int32_t middle = tile.middle[i];
    for (int32_t j = 0; j < n; ++j) {
        const int32_t encoding = as_int(v[j]);
        const float random = float(int32_t((key.bits(column + uint32_t(j)) + turn) >> 16));
        const float exact = lattice_point(encoding, lattice.k, encoding < middle ? low_base : lattice.base);
        const float rounded = std::floor(std::max(exact, exact * stretch) + (random * spread + slack));
        point[j] = clamp(rounded, -252.0f, 1.0f);
    }
    if (kCounts) {
        int32_t positive = 0, at_floor = 0;
        for (int32_t j = 0; j < n; ++j) {
            const float root = lattice.root(positive_part(point[j]) + point[j]);
            const float stored = least_positive(root * root, lattice.hi);
            positive += v[j] >= kTiny;
            at_floor += v[j] >= kTiny && (stored == 0.0f || stored > 2.0f * v[j]);
        }
        tile.counted.positive += positive;
        tile.counted.at_floor += at_floor;
    }
    int32_t size_bits = 0;
    for (int32_t j = 0; j < n; ++j) {
        const float live_m = v[j] < kTiny ? 0.0f : m[j];
        m[j] = live_m / least_positive(lattice.root(positive_part(point[j]) + point[j]), lattice.root_hi);
        size_bits = std::max(size_bits, as_int(m[j]) & 0x7FFFFFFF);
    }
    for (int32_t j = 0; j < n; ++j) codes[j] = uint8_t(v[j] < kTiny ? 0 : int32_t(point[j]) + 253);
    tile.exponent[i] = std::min(std::max((size_bits + 0x7FFFFF) >> 23, 1), 253);
}

// Encodes the first moments of block `i`.
template <class Count>
void encode_m(const Task& t, Tile& tile, int64_t i, Count n) {
    uint8_t* __restrict codes = t.m_codes + tile.start[i];
    float* __restrict m = tile.m.at(i * tile.stride);
    const float per_unit = as_float((254 - tile.exponent[i]) << 23);
    for (int32_t j = 0; j < n; ++j) {
        const int32_t encoding = as_int(m[j]);
        const float x = least_positive(as_float(encoding & 0x7FFFFFFF) * per_unit, 1.0f);
        m[j] = as_float(E4M3::nearest(((std::sqrt(x) * x) * x) * 448.0f) | ((encoding >> 24) & 0x80));
    }
    for (int32_t j = 0; j < n; ++j) codes[j] = uint8_t(as_int(m[j]));
}

// Stores what belongs to the blocks.
void finish(const Task& t, const Tile& tile, int64_t first) {
    for (int64_t i = 0; i < tile.count; ++i) {
        t.m_scale[first + i] = uint8_t(tile.exponent[i]);
        t.v_max[first + i] = tile.fresh.hi[i];
        t.v_density[first + i] = uint8_t(tile.density[i]);
        t.v_split[first + i] = uint8_t(tile.fresh.split[i]);
        t.v_gap[first + i] = uint8_t(tile.fresh.gap[i]);
    }
}

// Calls `stage` with each block of a tile and the number of its elements, a constant if it is the usual one.
template <class Stage>
inline void each(const Tile& tile, Stage stage) {
    for (int64_t i = 0; i < tile.count; ++i) {
        if (tile.length[i] == kBlock)
            stage(i, std::integral_constant<int32_t, kBlock>());
        else
            stage(i, int32_t(tile.length[i]));
    }
}

template <class Weight, class Grad, bool kCounts>
void step(const Task& t) {
    const int64_t blocks = t.rows * ((t.columns + t.block_size - 1) / t.block_size);
    Counted counted;
#pragma omp parallel num_threads(t.threads) if (t.threads > 1)
    {
        Tile tile(t.block_size);
#pragma omp for
        for (int64_t first = 0; first < blocks; first += kTile) {
            begin(t, tile, first);
            each(tile, [&](int64_t i, auto n) {
                expand<Weight, Grad>(t, tile, i, n);
                decode(t, tile, i, n);
            });
            each(tile, [&](int64_t i, auto n) { update<Weight, kCounts>(t, tile, i, n); });
            choose(tile);
            each(tile, [&](int64_t i, auto n) { encode_v<kCounts>(t, tile, i, n); });
            each(tile, [&](int64_t i, auto n) { encode_m(t, tile, i, n); });
            finish(t, tile, first);
        }
#pragma omp critical
        counted.add(tile.counted);
    }
    if (kCounts) counted.add_to(t.counts);
}

template <class Weight, class Grad>
void step(const Task& t) {
    t.counts ? step<Weight, Grad, true>(t) : step<Weight, Grad, false>(t);
}

}  // namespace

extern "C" void fp8_adamw(const Task* task) {
    const Task& t = *task;
    if (t.bf16_weight) {
        t.bf16_grad ? step<uint16_t, uint16_t>(t) : step<uint16_t, float>(t);
    } else {
        t.bf16_grad ? step<float, uint16_t>(t) : step<float, float>(t);
    }
}
