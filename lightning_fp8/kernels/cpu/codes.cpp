// FP8 codes of a tensor with one scale, and the values of codes, on a CPU: each in one pass over memory.
//
// Codes are those of `numerics/quantize.py`, whose operations go through memory five times: a quotient, limited to what
// the format holds, rounded to nearest even. NaN becomes NaN.

#include <algorithm>
#include <cstdint>

#include "numerics.h"

namespace {

constexpr int64_t kChunk = 1 << 14;  // elements that a thread takes at a time

template <class Format, class X>
void encode(const X* __restrict x, float scale, uint8_t* __restrict codes, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const int32_t encoding = as_int(load(x, i) / scale), magnitude = encoding & 0x7FFFFFFF;
        const int32_t code = Format::nearest(as_float(std::min(magnitude, as_int(Format::kMax))));
        codes[i] = uint8_t((magnitude > 0x7F800000 ? 0x7F : code) | ((encoding >> 24) & 0x80));
    }
}

template <class Value>
void decode(const uint8_t* __restrict codes, const Value* __restrict levels, Value* __restrict values, int64_t n) {
    for (int64_t i = 0; i < n; ++i) values[i] = levels[codes[i]];
}

// Calls `loop` with the beginning and the length of each chunk of `n` elements.
template <class Loop>
void in_chunks(int64_t n, int32_t threads, Loop loop) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > kChunk)
    for (int64_t first = 0; first < n; first += kChunk) loop(first, std::min(kChunk, n - first));
}

template <class Format, class X>
void encode_all(const void* x, float scale, uint8_t* codes, int64_t n, int32_t threads) {
    in_chunks(n, threads, [=](int64_t first, int64_t count) {
        encode<Format>(static_cast<const X*>(x) + first, scale, codes + first, count);
    });
}

template <class Value>
void decode_all(const uint8_t* codes, const void* levels, void* values, int64_t n, int32_t threads) {
    in_chunks(n, threads, [=](int64_t first, int64_t count) {
        decode(codes + first, static_cast<const Value*>(levels), static_cast<Value*>(values) + first, count);
    });
}

}  // namespace

// `x` is bf16 or fp32, and so are the 256 `levels` that codes stand for.

extern "C" void fp8_encode(const void* x, int32_t bf16, int32_t e4m3, float scale, uint8_t* codes, int64_t n,
                           int32_t threads) {
    const auto encode = e4m3 ? (bf16 ? encode_all<E4M3, uint16_t> : encode_all<E4M3, float>)
                             : (bf16 ? encode_all<E5M2, uint16_t> : encode_all<E5M2, float>);
    encode(x, scale, codes, n, threads);
}

extern "C" void fp8_decode(const uint8_t* codes, int32_t bf16, const void* levels, void* values, int64_t n,
                           int32_t threads) {
    (bf16 ? decode_all<uint16_t> : decode_all<float>)(codes, levels, values, n, threads);
}
