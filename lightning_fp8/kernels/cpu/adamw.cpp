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
    RowKey(const Task& t, uint32_t step, uint32_t row) {
        first = mix(mix(uint32_t(t.key0) ^ mix(step), uint32_t(t.key1)) ^ row);
        second = mix(first ^ uint32_t(t.key1), row);
    }
    uint32_t bits(uint32_t column) const { return mix(column ^ first, second); }
};

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

constexpr int32_t kTinyBits = 1 << 23, kHugeBits = 254 << 23, kDensityBits = 20, kDensityBias = (127 + 2) << 3;
const float kTiny = as_float(kTinyBits);

struct Lattice {
    float hi, root_hi, k, base, first, period, step, octave;

    Lattice(float hi_, uint8_t density) : hi(hi_) {
        const float positive = std::max(hi, kTiny);
        k = as_float((int32_t(density) + kDensityBias) << kDensityBits);
        int32_t exponent;
        float log;
        log2_parts(as_int(positive), exponent, log);
        const double last = std::floor((double(exponent) + double(log)) * double(k) - 0x1p-12);
        const double length = 2.0 * double(k), octaves = std::floor(last / length);
        root_hi = std::sqrt(positive);
        base = float(last);
        first = float(last - octaves * length - 253.0);
        period = float(length);
        step = float(1.0 / length);
        octave = float(octaves);
    }

    // The root of the lattice point of `code`.
    float root(float code) const {
        const float point = (std::max(code - 253.0f, 0.0f) + code) + first;
        const float octaves = std::floor((point + 0.5f) * step);
        const float fraction = (point - octaves * period) * step;
        return exp2_parts(octaves + octave, fraction);
    }

    // k * log2(v) - base.
    float point(int32_t encoding) const {
        int32_t exponent;
        float log;
        log2_parts(encoding, exponent, log);
        return (float(exponent) * k - base) + log * k;
    }
};

inline uint8_t density_of(float hi, float lo) {
    int32_t hi_octave, lo_octave;
    float hi_log, lo_log;
    log2_parts(as_int(hi), hi_octave, hi_log);
    log2_parts(as_int(lo), lo_octave, lo_log);
    const float octaves = float(hi_octave - lo_octave) + (hi_log - lo_log);
    const float densest = 252.0f / std::min(std::max(octaves, 252.0f / 1024.0f), 42.0f);
    return uint8_t((as_int(densest) >> kDensityBits) - kDensityBias);
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

struct Scratch {
    std::vector<float> m, v, ratio;
    explicit Scratch(int64_t size) : m(size), v(size), ratio(size) {}
};

template <class Weight, class Grad>
void step_block(const Task& t, Scratch& scratch, int64_t row, int64_t block, int64_t blocks, const RowKey& weight_key,
                const RowKey& dither_key) {
    const int64_t start = row * t.columns + block * t.block_size, scale = row * blocks + block;
    const int64_t n = std::min(t.block_size, t.columns - block * t.block_size);
    const uint32_t column = uint32_t(t.first_column + block * t.block_size);
    Weight* __restrict weight = static_cast<Weight*>(t.weight) + start;
    const Grad* __restrict grad = static_cast<const Grad*>(t.grad) + start;
    uint8_t* __restrict m_codes = t.m_codes + start;
    uint8_t* __restrict v_codes = t.v_codes + start;
    float* __restrict m = scratch.m.data();
    float* __restrict v = scratch.v.data();
    float* __restrict ratio = scratch.ratio.data();
    const float* __restrict levels = t.m_levels;

    // Decode, update the moments and the weight.
    const Lattice old(t.v_max[scale], t.v_density[scale]);
    const float unit = as_float(int32_t(t.m_scale[scale]) << 23);
    for (int64_t i = 0; i < n; ++i) m[i] = levels[m_codes[i]];
    int32_t hi_bits = 0, lo_bits = kHugeBits;
    for (int64_t i = 0; i < n; ++i) {
        const float code = float(v_codes[i]), g = load(grad, i) * t.sign;
        const float root = old.root(code);
        const float old_v = std::min(root * root, old.hi) * std::min(code, 1.0f);
        const float new_m = ((m[i] * unit) * std::min(root, old.root_hi)) * t.beta1 + g * t.rest1;
        const float new_v = old_v * t.beta2 + (g * g) * t.rest2;
        m[i] = new_m;
        v[i] = new_v;
        const int32_t encoding = as_int(new_v);
        hi_bits = std::max(hi_bits, encoding);
        lo_bits = std::min(lo_bits, encoding < kTinyBits ? kHugeBits : encoding);
    }
    for (int64_t i = 0; i < n; ++i) {
        const float u = (m[i] * t.m_correction) / (std::sqrt(v[i] * t.v_correction) + t.eps);
        const float update = std::min(std::max(u, -t.max_update), t.max_update);
        const float exact = load(weight, i) * t.shrink - update * t.lr;
        store(weight, i, exact, weight_key.bits(column + uint32_t(i)));
    }

    // Encode v.
    const float hi = hi_bits < kTinyBits ? 0.0f : as_float(hi_bits);
    const float positive = std::max(hi, kTiny);
    const uint8_t density = density_of(positive, as_float(lo_bits));
    const Lattice lattice(hi, density);
    const float stretch = 1.0f / lattice.point(as_int(positive));
    const float slack = lattice.k * 0x1p-20f + 0x1p-16f, spread = 1.0f - 2.0f * slack;
    const uint32_t turn = uint32_t(t.step) * kGolden;
    int32_t size_bits = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t encoding = as_int(v[i]), live = encoding < kTinyBits ? 0 : -1;
        const float random = float(int32_t((dither_key.bits(column + uint32_t(i)) + turn) >> 16)) * 0x1p-16f;
        const float exact = lattice.point(encoding);
        const float rounded = std::floor(std::max(exact, exact * stretch) + (random * spread + slack));
        const int32_t code = (int32_t(std::min(std::max(rounded, -252.0f), 1.0f)) + 253) & live;
        v_codes[i] = uint8_t(code);
        // ... and m in units of its root.
        const float root = std::min(lattice.root(float(code)), lattice.root_hi);
        ratio[i] = as_float(as_int(m[i]) & live) / root;
        size_bits = std::max(size_bits, as_int(ratio[i]) & 0x7FFFFFFF);
    }

    // Encode m.
    const int32_t exponent = std::min(std::max((size_bits + 0x7FFFFF) >> 23, 1), 253);
    const float per_unit = as_float((254 - exponent) << 23);
    for (int64_t i = 0; i < n; ++i) {
        const int32_t encoding = as_int(ratio[i]);
        const float x = std::min(as_float(encoding & 0x7FFFFFFF) * per_unit, 1.0f);
        m_codes[i] = uint8_t(e4m3(((std::sqrt(x) * x) * x) * 448.0f) | ((encoding >> 24) & 0x80));
    }
    t.v_max[scale] = hi;
    t.v_density[scale] = density;
    t.m_scale[scale] = uint8_t(exponent);
}

template <class Weight, class Grad>
void step(const Task& t) {
    const int64_t blocks = (t.columns + t.block_size - 1) / t.block_size;
#pragma omp parallel num_threads(t.threads) if (t.threads > 1)
    {
        Scratch scratch(t.block_size);
#pragma omp for
        for (int64_t row = 0; row < t.rows; ++row) {
            const uint32_t whole = uint32_t(t.whole_rows[row]);
            const RowKey weight_key(t, uint32_t(t.step), whole);
            const RowKey dither_key(t, uint32_t(t.step >> 10) ^ kDither, whole);
            for (int64_t block = 0; block < blocks; ++block)
                step_block<Weight, Grad>(t, scratch, row, block, blocks, weight_key, dither_key);
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
