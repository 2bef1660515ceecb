/* What both AVX2 kernels share. */
#ifndef DBLLM_AVX2_H
#define DBLLM_AVX2_H

#include "fdb.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,f16c,fma")))
#define INLINE TARGET __attribute__((always_inline)) static inline

/* Largest magnitude of `words` words, NaN if any input is not finite. */
INLINE float largest_magnitude(const float* x, int64_t words) {
    const __m256 sign = _mm256_set1_ps(-0.0f), infinity = _mm256_set1_ps(INFINITY);
    __m256 largest = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
    float lanes[8], result = 0;
    for (int64_t i = 0; i < words * FDB_WORD_INPUTS; i += 8) {
        __m256 magnitude = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i));
        bad = _mm256_or_ps(bad, _mm256_cmp_ps(magnitude, infinity, _CMP_NLT_UQ));
        largest = _mm256_max_ps(largest, magnitude);
    }
    if (_mm256_movemask_ps(bad)) return NAN;
    _mm256_storeu_ps(lanes, largest);
    for (int i = 0; i < 8; i++) result = lanes[i] > result ? lanes[i] : result;
    return result;
}

/* Scales of 8 rows. */
INLINE __m256 load_scales(const uint8_t* halves) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)halves));
}

TARGET static void add_offsets(const uint8_t* halves, int64_t groups, const float* sums,
                               int64_t columns, float* y) {
    enum { VECTORS = FDB_BLOCK_ROWS / 8 };
    for (int64_t c = 0; c < columns; c++, y += FDB_BLOCK_ROWS) {
        __m256 total[VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) total[i] = _mm256_loadu_ps(y + i * 8);
        for (int64_t group = 0; group < groups; group++) {
            const uint8_t* own = halves + group * FDB_BLOCK_ROWS * 2;
            __m256 sum = _mm256_set1_ps(sums[group * columns + c]);
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; i++)
                total[i] = _mm256_fmadd_ps(sum, load_scales(own + i * 16), total[i]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) _mm256_storeu_ps(y + i * 8, total[i]);
    }
}

#endif

extern const fdb_kernel fdb_avx2_integer;
extern const fdb_kernel fdb_avx2_exact;

#endif
