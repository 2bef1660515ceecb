/* Exponentials and the gated activation, as loops that compilers make vectors of. */
#ifndef DBLLM_ACTIVATION_H
#define DBLLM_ACTIVATION_H

#include <math.h>
#include <stdint.h>

#include "decode.h"
#include "floats.h"

#define DECODE_INLINE __attribute__((always_inline)) static inline

/* e^x for x <= 0, NaN for NaN, within 2e-7 of itself; 0 far below. */
DECODE_INLINE float decode_exp(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float clamped = x < -87.0f ? -87.0f : x;
    float shifted = clamped * 1.44269504f + magic, n = shifted - magic;
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    float power = fdb_float_of((fdb_bits_of(shifted) + 127u) << 23);
    return x < -87.0f ? 0.0f : p * power;
}

DECODE_INLINE void gated_silu(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float x = gate[i], e = decode_exp(x > 0 ? -x : x);
        gate[i] = x * (x > 0 ? 1.0f : e) / (1.0f + e) * up[i];
    }
}

#endif
