// The step of FP8AdamW on one parameter, on a CPU: a block at a time, in a cache, every loop one that compilers vectorise.
//
// It does what `optim/step.py` does with moments "fp8", operation by operation in the same order, so that all results
// are the same to the last bit; what the formulas mean is said there, in `numerics/moments.py`, `numerics/elementary.py`
// and `numerics/rounding.py`. It must be compiled without contraction of floating-point expressions.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline int32_t as_int(float x) { return bits<int32_t>(x); }
inline float as_float(int32_t x) { return bits<float>(x); }

}  // namespace

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
    float beta1, rest1, beta2, rest2, eps, shrink, lr, sign, max_update, m_correction, v_correction;
    int32_t bf16_weight, bf16_grad, threads;
};

namespace {

// rounding.py

constexpr uint32_t kGolden = 0x9E3779B9u, kDither = 0x80000000u;

inline uint32_t mix(uint32_t x, uint32_t key = 0) {
    x = ((x ^ (x >> 16)) * 0x7FEB352Du) ^ key;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

struct RowKey {
    uint32_t first, second;
    uint32_t bits(uint32_t column) const { return mix(column ^ first, second); }
};

// `step` is `mix`ed.
inline RowKey row_key(const Task& t, uint32_t step, uint32_t row) {
    const uint32_t first = mix(mix(uint32_t(t.key0) ^ step, uint32_t(t.key1)) ^ row);
    return {first, mix(first ^ uint32_t(t.key1), row)};
}

// Rounds to bf16, down or up as the 16 random bits say, and returns its bits; inf and NaN stay what they are.
inline uint16_t stochastic_bf16(float x, uint32_t random) {
    const uint32_t encoding = bits<uint32_t>(x);
    const bool finite = (encoding & 0x7FFFFFFFu) < 0x7F800000u;
    const uint32_t carried = encoding + (finite ? random & 0xFFFFu : 0u);
    const bool nan = (encoding & 0x7FFFFFFFu) > 0x7F800000u;
    return nan ? uint16_t(0x7FC0u) : uint16_t(carried >> 16);
}

// elementary.py

inline void log2_parts(int32_t encoding, int32_t& octave, float& log) {
    const int32_t offset = int32_t(uint32_t(encoding) - 0x3F3504F3u);
    const float x = as_float((offset & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
    float p = x * float(-0.14574450463843952);
    p = (p + float(0.23689039125907077)) * x;
    p = (p + float(-0.2500690359957697)) * x;
    p = (p + float(0.28670745336892905)) * x;
    p = (p + float(-0.36008721622825)) * x;
    p = (p + float(0.4809394449089522)) * x;
    p = (p + float(-0.7213571489144762)) * x;
    p = p + float(1.442694772427166);
    octave = offset >> 23;
    log = p * x;
}

inline float exp2_parts(float octaves, float x) {
    float p = x * float(0.0018671300698853328);
    p = (p + float(0.009017030322426758)) * x;
    p = (p + float(0.05579991310374498)) * x;
    p = (p + float(0.24016445015509036)) * x;
    p = p + float(0.6931513118046008);
    const float mantissa = p * x + 1.0f;
    return as_float((int32_t(octaves) << 23) + as_int(mantissa));
}

// moments.py

// A step goes through a tile of blocks once for each of its stages. What belongs to a block is computed between them for
// all blocks of the tile at once; it is a chain of hundreds of cycles, which else would be waited for in every block.
constexpr int64_t kTile = 16;
constexpr int32_t kTinyBits = 1 << 23, kHugeBits = 254 << 23, kDensityBits = 20, kDensityBias = (127 + 2) << 3;
const float kTiny = as_float(kTinyBits);

// The lattice of a block: what its numbers mean is said in moments.py.
struct Lattice {
    float hi, root_hi, k, base, first, period, step, octave, split, gap;

    // The root of the lattice point of `code`.
    float root(float code) const {
        const float skipped = std::min(std::max(split - code, 0.0f), 1.0f) * gap;
        const float point = (std::max(code - 253.0f, 0.0f) + code) + first;
        const float octaves = std::floor((point + 0.5f) * step);
        const float fraction = (point - octaves * period) * step;
        return exp2_parts((octaves + octave) - skipped, fraction);
    }
};

// Those of the blocks of a tile, which are computed at once.
struct Lattices {
    float hi[kTile], root_hi[kTile], k[kTile], base[kTile], first[kTile], period[kTile], step[kTile], octave[kTile],
        split[kTile], gap[kTile];

    void compute(const int32_t* density) {
        for (int64_t i = 0; i < kTile; ++i) {
            const float positive = std::max(hi[i], kTiny);
            k[i] = as_float((density[i] + kDensityBias) << kDensityBits);
            int32_t exponent;
            float log;
            log2_parts(as_int(positive), exponent, log);
            const double last = std::floor((double(exponent) + double(log)) * double(k[i]) - 0x1p-12);
            const double length = 2.0 * double(k[i]), octaves = std::floor(last / length);
            root_hi[i] = std::sqrt(positive);
            base[i] = float(last);
            first[i] = float(last - octaves * length - 253.0);
            period[i] = float(length);
            step[i] = float(1.0 / length);
            octave[i] = float(octaves);
        }
    }

    Lattice operator[](int64_t i) const {
        return {hi[i], root_hi[i], k[i], base[i], first[i], period[i], step[i], octave[i], split[i], gap[i]};
    }
};

// k * log2(v) - base.
inline float lattice_point(int32_t encoding, float k, float base) {
    int32_t exponent;
    float log;
    log2_parts(encoding, exponent, log);
    return (float(exponent) * k - base) + log * k;
}

inline float octaves_between(float hi, float lo) {
    int32_t hi_octave, lo_octave;
    float hi_log, lo_log;
    log2_parts(as_int(hi), hi_octave, hi_log);
    log2_parts(as_int(lo), lo_octave, lo_log);
    return float(hi_octave - lo_octave) + (hi_log - lo_log);
}

inline float gap_of(float hi, float over, float under) {
    const float gap = std::floor(octaves_between(over, std::max(under, kTiny)) * 0.5f - 0.25f);
    return under >= kTiny && octaves_between(hi, over) < 40.0f ? std::min(std::max(gap, 0.0f), 40.0f) : 0.0f;
}

inline int32_t density_of(float hi, float lo, float gap) {
    const float octaves = octaves_between(hi, lo) - 2.0f * gap;
    const float densest = 252.0f / std::min(std::max(octaves, 252.0f / 1024.0f), 42.0f);
    return (as_int(densest) >> kDensityBits) - kDensityBias;
}

// The code of E4M3 nearest to `x` in [0, 448], ties to even.
inline int32_t e4m3(float x) {
    const int32_t encoding = as_int(x);
    const int32_t normal = ((encoding + 0x7FFFF + ((encoding >> 20) & 1)) >> 20) - (120 << 3);
    const int32_t subnormal = as_int(std::min(x, 0x1p-6f) + 0x1p14f) - as_int(0x1p14f);
    return std::max(normal, subnormal);
}

inline float load(const uint16_t* p, int64_t i) { return as_float(int32_t(uint32_t(p[i]) << 16)); }
inline float load(const float* p, int64_t i) { return p[i]; }
inline void store(uint16_t* p, int64_t i, float exact, uint32_t random) { p[i] = stochastic_bf16(exact, random); }
inline void store(float* p, int64_t i, float exact, uint32_t) { p[i] = exact; }

// The state of a step between its stages, each of which goes through all blocks of the tile.
struct Tile {
    std::vector<float> m, v;
    int64_t start[kTile], length[kTile], count;
    uint32_t column[kTile];
    int32_t row[kTile], density[kTile], middle[kTile], hi_bits[kTile], lo_bits[kTile], over[kTile], under[kTile];
    float unit[kTile], stretch[kTile], slack[kTile], spread[kTile], low_base[kTile];
    RowKey weight_key[kTile], dither_key[kTile];
    Lattices old, fresh;

    explicit Tile(int64_t block_size) : m(kTile * block_size), v(kTile * block_size) {}
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

// What the codes of m stand for, in units of its scale and of the root of v.
void look_up(const Task& t, Tile& tile, int64_t i) {
    const int64_t n = tile.length[i];
    const uint8_t* __restrict codes = t.m_codes + tile.start[i];
    const float* __restrict levels = t.m_levels;
    float* __restrict m = tile.m.data() + i * t.block_size;
    for (int64_t j = 0; j < n; ++j) m[j] = levels[codes[j]];
}

// Decodes block `i`, updates its moments and its weight.
template <class Weight, class Grad>
void update(const Task& t, Tile& tile, int64_t i) {
    const int64_t n = tile.length[i];
    Weight* __restrict weight = static_cast<Weight*>(t.weight) + tile.start[i];
    const Grad* __restrict grad = static_cast<const Grad*>(t.grad) + tile.start[i];
    const uint8_t* __restrict v_codes = t.v_codes + tile.start[i];
    float* __restrict m = tile.m.data() + i * t.block_size;
    float* __restrict v = tile.v.data() + i * t.block_size;
    const Lattice old = tile.old[i];
    const RowKey key = tile.weight_key[i];
    const uint32_t column = tile.column[i];
    const float unit = tile.unit[i], sign = t.sign, beta1 = t.beta1, rest1 = t.rest1, beta2 = t.beta2, rest2 = t.rest2;
    int32_t hi_bits = 0, lo_bits = kHugeBits;
    for (int64_t j = 0; j < n; ++j) {
        const float code = float(v_codes[j]), g = load(grad, j) * sign;
        const float root = old.root(code);
        const float old_v = std::min(root * root, old.hi) * std::min(code, 1.0f);
        const float new_m = ((m[j] * unit) * std::min(root, old.root_hi)) * beta1 + g * rest1;
        const float new_v = old_v * beta2 + (g * g) * rest2;
        m[j] = new_m;
        v[j] = new_v;
        const int32_t encoding = as_int(new_v);
        hi_bits = std::max(hi_bits, encoding);
        lo_bits = std::min(lo_bits, encoding < kTinyBits ? kHugeBits : encoding);
    }
    const float m_correction = t.m_correction, v_correction = t.v_correction, eps = t.eps, lr = t.lr;
    const float shrink = t.shrink, limit = t.max_update;
    for (int64_t j = 0; j < n; ++j) {
        const float u = (m[j] * m_correction) / (std::sqrt(v[j] * v_correction) + eps);
        const float exact = load(weight, j) * shrink - std::min(std::max(u, -limit), limit) * lr;
        store(weight, j, exact, key.bits(column + uint32_t(j)));
    }
    tile.hi_bits[i] = hi_bits;
    tile.lo_bits[i] = lo_bits;
    tile.middle[i] = (std::max(hi_bits, kTinyBits) >> 1) + (lo_bits >> 1);
    int32_t over = kHugeBits, under = 0;
    const int32_t middle = tile.middle[i];
    for (int64_t j = 0; j < n; ++j) {
        const int32_t encoding = as_int(v[j]), low = (encoding - middle) >> 31;  // masks, or it stays a scalar loop
        over = std::min(over, std::max(encoding, kHugeBits & low));
        under = std::max(under, encoding & low);
    }
    tile.over[i] = over;
    tile.under[i] = under;
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
        tile.slack[i] = k * 0x1p-20f + 0x1p-16f;
        tile.spread[i] = 1.0f - 2.0f * tile.slack[i];
        tile.low_base[i] = base - 2.0f * k * gap;
        const float over = std::floor(lattice_point(tile.over[i], k, base));
        split[i] = (std::min(std::max(over, -252.0f), 1.0f) + 253.0f) * std::min(gap, 1.0f);
    }
    std::copy(split, split + kTile, tile.fresh.split);
}

// Encodes both moments of block `i`.
void encode(const Task& t, Tile& tile, int64_t i, int64_t scale) {
    const int64_t n = tile.length[i];
    uint8_t* __restrict m_codes = t.m_codes + tile.start[i];
    uint8_t* __restrict v_codes = t.v_codes + tile.start[i];
    float* __restrict m = tile.m.data() + i * t.block_size;
    const float* __restrict v = tile.v.data() + i * t.block_size;
    const Lattice lattice = tile.fresh[i];
    const RowKey key = tile.dither_key[i];
    const uint32_t column = tile.column[i], turn = uint32_t(t.step) * kGolden;
    const float stretch = tile.stretch[i], slack = tile.slack[i], spread = tile.spread[i], low_base = tile.low_base[i];
    const int32_t middle = tile.middle[i];
    int32_t size_bits = 0;
    for (int64_t j = 0; j < n; ++j) {
        const int32_t encoding = as_int(v[j]), live = encoding < kTinyBits ? 0 : -1;
        const float random = float(int32_t((key.bits(column + uint32_t(j)) + turn) >> 16)) * 0x1p-16f;
        const float exact = lattice_point(encoding, lattice.k, encoding < middle ? low_base : lattice.base);
        const float rounded = std::floor(std::max(exact, exact * stretch) + (random * spread + slack));
        const int32_t code = (int32_t(std::min(std::max(rounded, -252.0f), 1.0f)) + 253) & live;
        v_codes[j] = uint8_t(code);
        // m in units of the root of what is stored
        const float root = std::min(lattice.root(float(code)), lattice.root_hi);
        const float ratio = as_float(as_int(m[j]) & live) / root;
        m[j] = ratio;
        size_bits = std::max(size_bits, as_int(ratio) & 0x7FFFFFFF);
    }
    const int32_t exponent = std::min(std::max((size_bits + 0x7FFFFF) >> 23, 1), 253);
    const float per_unit = as_float((254 - exponent) << 23);
    for (int64_t j = 0; j < n; ++j) {
        const int32_t encoding = as_int(m[j]);
        const float x = std::min(as_float(encoding & 0x7FFFFFFF) * per_unit, 1.0f);
        m_codes[j] = uint8_t(e4m3(((std::sqrt(x) * x) * x) * 448.0f) | ((encoding >> 24) & 0x80));
    }
    t.m_scale[scale] = uint8_t(exponent);
    t.v_max[scale] = lattice.hi;
    t.v_density[scale] = uint8_t(tile.density[i]);
    t.v_split[scale] = uint8_t(lattice.split);
    t.v_gap[scale] = uint8_t(lattice.gap);
}

template <class Weight, class Grad>
void step(const Task& t) {
    const int64_t blocks = t.rows * ((t.columns + t.block_size - 1) / t.block_size);
#pragma omp parallel num_threads(t.threads) if (t.threads > 1)
    {
        Tile tile(t.block_size);
#pragma omp for
        for (int64_t first = 0; first < blocks; first += kTile) {
            begin(t, tile, first);
            for (int64_t i = 0; i < tile.count; ++i) look_up(t, tile, i);
            for (int64_t i = 0; i < tile.count; ++i) update<Weight, Grad>(t, tile, i);
            choose(tile);
            for (int64_t i = 0; i < tile.count; ++i) encode(t, tile, i, first + i);
        }
    }
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
