// The arithmetic of the kernels for CPUs: random bits, logarithms, FP8 codes, and the codes of moments.
//
// These are the torch operations of `numerics/rounding.py`, `numerics/elementary.py` and `numerics/moments.py`, in
// their order, so that all results are the same to the last bit; what the formulas mean is said there. What is computed
// for each number has 32 bits and no branches, so that a loop around it becomes one of vectors.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

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

// An element of a tensor in bf16 or fp32.
inline float load(const uint16_t* p, int64_t i) { return as_float(int32_t(uint32_t(p[i]) << 16)); }
inline float load(const float* p, int64_t i) { return p[i]; }

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

// Rounds to bf16, down or up as the 16 random bits say, and returns its bits; inf and NaN stay what they are. (The bits
// that are added to inf carry nothing.)
inline uint16_t stochastic_bf16(float x, uint32_t random) {
    const uint32_t encoding = bits<uint32_t>(x), carried = encoding + (random & 0xFFFFu);
    return uint16_t((encoding & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : carried >> 16);
}

// Minima and maxima of floats that are not NaN as those of their encodings, which are one instruction: between floats,
// the compiler has to compare and to choose, for the sake of NaN. Encodings of negative numbers run the other way.
inline float least_positive(float x, float y) { return as_float(std::min(as_int(x), as_int(y))); }
inline float positive_part(float x) { return as_float(std::max(as_int(x), 0)); }
// Of any `x`, for `low` < 0 < `high`.
inline float clamp(float x, float low, float high) {
    const uint32_t above = std::min(bits<uint32_t>(x), bits<uint32_t>(low));
    return as_float(std::min(int32_t(above), as_int(high)));
}

// elementary.py

constexpr int32_t kOctave = 1 << 23;  // between the encodings of x and 2 x

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
    return as_float(int32_t(octaves) * kOctave + as_int(mantissa));
}

// moments.py

constexpr int32_t kTinyBits = 1 << 23, kHugeBits = 254 << 23, kDensityBits = 20, kDensityBias = (127 + 2) << 3;
constexpr float kTiny = 0x1p-126f;
constexpr int64_t kTile = 16;  // blocks that are computed at once

// The lattice of a block: what its numbers mean is said in moments.py; `first` is that of code 253.
struct Lattice {
    float hi, root_hi, k, base, first, period, step, split;
    int32_t exponent, exponent_below;  // to add to those of roots from the split on, and below it

    // The root of lattice point `point`: code - 253, but 2 for code 254, which means hi: a point surely above it.
    float root(float point) const {
        const float place = point + first;
        const float octaves = std::floor((place + 0.5f) * step);
        const float fraction = (place - octaves * period) * step;
        return as_float(as_int(exp2_parts(octaves, fraction)) + (point < split ? exponent_below : exponent));
    }
};

// Those of a tile of blocks. It is a chain of hundreds of cycles, which else would be waited for in every block.
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
            first[i] = float(last - octaves * length);
            period[i] = float(length);
            step[i] = float(1.0 / length);
            octave[i] = float(octaves);
        }
    }

    Lattice operator[](int64_t i) const {
        const int32_t above = int32_t(octave[i]), below = above - int32_t(gap[i]);
        return {hi[i], root_hi[i], k[i], base[i], first[i], period[i], step[i], split[i] - 253.0f,
                above * kOctave, below * kOctave};
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

// formats.py

// An 8-bit format: of its codes' mantissas the width, of its normal values the smallest's exponent field in fp32.
template <int32_t kMantissa, int32_t kMinExponent>
struct Format {
    // The code nearest to `x`, not negative and no more than the format holds, ties to even: the addition rounds to
    // multiples of the spacing there.
    static int32_t nearest(float x) {
        const int32_t binade = std::max(as_int(x) & (255 << 23), kMinExponent << 23);
        const int32_t magic = binade + ((23 - kMantissa) << 23);
        return (as_int(x + as_float(magic)) - magic) + ((binade >> (23 - kMantissa)) - (kMinExponent << kMantissa));
    }
};
struct E4M3 : Format<3, 121> {
    static constexpr float kMax = 448.0f;
};
struct E5M2 : Format<2, 113> {
    static constexpr float kMax = 57344.0f;
};

}  // namespace
