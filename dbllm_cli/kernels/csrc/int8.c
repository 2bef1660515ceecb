#include "int8.h"

#include <math.h>
#include <string.h>

#include "fdb.h"
#include "floats.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define AVX2 __attribute__((target("avx2")))
#endif
#define INLINE __attribute__((always_inline)) static inline

enum { LARGEST = 32767, ROWS = 4, COLUMNS = 4 };

void int8_quantize(const float *x, int64_t in, int16_t *q, float *steps) {
    for (int64_t first = 0; first < in; first += INT8_STRETCH) {
        int64_t last = in < first + INT8_STRETCH ? in : first + INT8_STRETCH;
        float largest = 0, bad = 0, factor;
        for (int64_t i = first; i < last; i++) {
            float magnitude = fabsf(x[i]);
            largest = magnitude > largest ? magnitude : largest;
            bad += x[i] * 0.0f;
        }
        *steps++ = fdb_step(largest + bad, LARGEST, &factor);
        for (int64_t i = first; i < last; i++)
            q[i] = bad == 0 ? (int16_t)lrintf(x[i] * factor) : 0;
    }
}

/* Sums of 4 rows for 1 column or 4, whose integers lie `stride` apart: sums [column][row]. */
typedef void (*sum_function)(const int8_t *const *rows, const int16_t *q, int64_t stride,
                             int64_t count, int32_t *sums);

/* A loop that compilers make vectors of. */
INLINE void plain_sums(const int8_t *const *rows, const int16_t *q, int64_t count, int32_t *sums) {
    const int8_t *w0 = rows[0], *w1 = rows[1], *w2 = rows[2], *w3 = rows[3];
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (int64_t i = 0; i < count; i++) {
        s0 += w0[i] * q[i];
        s1 += w1[i] * q[i];
        s2 += w2[i] * q[i];
        s3 += w3[i] * q[i];
    }
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}

INLINE void plain_sums_columns(const int8_t *const *rows, const int16_t *q, int64_t stride,
                               int64_t count, int columns, int32_t *sums) {
    for (int c = 0; c < columns; c++) plain_sums(rows, q + c * stride, count, sums + c * ROWS);
}

#if defined(__x86_64__)
AVX512 INLINE void avx512_sums_columns(const int8_t *const *rows, const int16_t *q, int64_t stride,
                                       int64_t count, int columns, int32_t *sums) {
    __m512i totals[COLUMNS][ROWS];
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) totals[c][r] = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 32) {
        __mmask32 there = count - i >= 32 ? 0xffffffffu : (1u << (count - i)) - 1;
        __m512i w[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
            w[r] = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, rows[r] + i));
    #pragma GCC unroll 4
    for (int c = 0; c < columns; c++) {
            __m512i x = _mm512_maskz_loadu_epi16(there, q + c * stride + i);
    #pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) totals[c][r] = _mm512_dpwssd_epi32(totals[c][r], w[r], x);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) sums[c * ROWS + r] = _mm512_reduce_add_epi32(totals[c][r]);
}
#endif

/* 4 rows for `count` columns from `column` on. */
INLINE void four_rows(const int8_t *const *from, const float *scales, const int16_t *q,
                      const float *steps, int64_t in, int64_t column, int count, sum_function sum,
                      int64_t valid, float *y, int64_t y_stride) {
    int64_t stretches = (in + INT8_STRETCH - 1) / INT8_STRETCH;
    float totals[COLUMNS * ROWS] = {0};
    for (int64_t s = 0; s < stretches; s++) {
        int64_t at = s * INT8_STRETCH, inputs = in - at < INT8_STRETCH ? in - at : INT8_STRETCH;
        const int8_t *rows[ROWS] = {from[0] + at, from[1] + at, from[2] + at, from[3] + at};
        int32_t sums[COLUMNS * ROWS];
        sum(rows, q + column * in + at, in, inputs, sums);
        for (int c = 0; c < count; c++)
            for (int r = 0; r < ROWS; r++)
                totals[c * ROWS + r] +=
                    steps[(column + c) * stretches + s] * (float)sums[c * ROWS + r];
    }
    for (int c = 0; c < count; c++)
        for (int64_t r = 0; r < valid; r++)
            y[(column + c) * y_stride + r] = scales[r] * totals[c * ROWS + r];
}

INLINE void product(const uint8_t *weight, const int16_t *q, const float *steps, int64_t in,
                    int64_t columns, int64_t rows, int64_t first, int64_t last, sum_function one,
                    sum_function four, float *y) {
    for (int64_t row = first; row < last; row += ROWS) {
        const int8_t *from[ROWS];
        float scales[ROWS];
        int64_t valid = last - row < ROWS ? last - row : ROWS, column = 0;
        for (int64_t r = 0; r < ROWS; r++) {
            uint16_t half;
            from[r] = (const int8_t *)weight + (row + (r < valid ? r : 0)) * (in + INT8_SCALE_BYTES);
            memcpy(&half, from[r] + in, sizeof half);
            scales[r] = fdb_from_float16(half);
        }
        for (; column + COLUMNS <= columns; column += COLUMNS)
            four_rows(from, scales, q, steps, in, column, COLUMNS, four, valid, y + row, rows);
        for (; column < columns; column++)
            four_rows(from, scales, q, steps, in, column, 1, one, valid, y + row, rows);
    }
}

#define SUMS(TARGET, NAME, COUNT, BODY)                                                          \
    TARGET static void NAME(const int8_t *const *rows, const int16_t *q, int64_t stride,         \
                            int64_t count, int32_t *sums) {                                      \
        BODY(rows, q, stride, count, COUNT, sums);                                               \
    }

SUMS(, portable_one, 1, plain_sums_columns)
SUMS(, portable_four, COLUMNS, plain_sums_columns)
#if defined(__x86_64__)
SUMS(AVX2, avx2_one, 1, plain_sums_columns)
SUMS(AVX2, avx2_four, COLUMNS, plain_sums_columns)
SUMS(AVX512, avx512_one, 1, avx512_sums_columns)
SUMS(AVX512, avx512_four, COLUMNS, avx512_sums_columns)
#endif

void int8_product(const uint8_t *weight, const int16_t *q, const float *steps, int64_t in,
                  int64_t columns, int64_t rows, int64_t first, int64_t last, float *y) {
    sum_function one = portable_one, four = portable_four;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw"))
        one = avx512_one, four = avx512_four;
    else if (__builtin_cpu_supports("avx2"))
        one = avx2_one, four = avx2_four;
#endif
    product(weight, q, steps, in, columns, rows, first, last, one, four, y);
}
