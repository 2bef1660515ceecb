/* bfloat16 and float16 to float32 and back, rounded to the nearest, ties to even. */
#ifndef DBLLM_FLOATS_H
#define DBLLM_FLOATS_H

#include <stdint.h>
#include <string.h>

static inline float fdb_float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t fdb_bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float fdb_from_bfloat16(uint16_t half) { return fdb_float_of((uint32_t)half << 16); }

static inline uint16_t fdb_to_bfloat16(float value) {
    uint32_t bits = fdb_bits_of(value), odd = bits >> 16 & 1;
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + odd) >> 16);
}

static inline float fdb_from_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = half >> 10 & 31u;
    uint32_t mantissa = half & 1023u;
    if (exponent == 0) return fdb_float_of(fdb_bits_of((float)mantissa * 0x1p-24f) | sign);
    return fdb_float_of(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13);
}

static inline uint16_t fdb_to_float16(float value) {
    uint32_t bits = fdb_bits_of(value), sign = bits >> 16 & 0x8000u;
    float magnitude = fdb_float_of(bits & 0x7fffffffu);
    if (value != value) return 0x7e00;
    if (magnitude >= 65520.0f) return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x1p-14f) /* the sum's last bit is worth 2^-24, as a denormal float16's is */
        return (uint16_t)(sign | (fdb_bits_of(magnitude + 0.5f) - fdb_bits_of(0.5f)));
    bits = fdb_bits_of(magnitude);
    bits += 0xfffu + (bits >> 13 & 1);
    return (uint16_t)(sign | (bits - (112u << 23)) >> 13);
}

/* Element `i` of float32 or bfloat16 numbers. */
static inline float fdb_float_at(const void* numbers, int64_t i, int bfloat16) {
    return bfloat16 ? fdb_from_bfloat16(((const uint16_t*)numbers)[i]) : ((const float*)numbers)[i];
}

#endif
