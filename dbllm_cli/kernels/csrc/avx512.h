/* What both AVX-512 kernels share. */
#ifndef DBLLM_AVX512_H
#define DBLLM_AVX512_H

#include "fdb.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,f16c,fma")))
#define INLINE TARGET __attribute__((always_inline)) static inline

/* Largest magnitude of `words` words, NaN if any input is not finite. */
INLINE float largest_magnitude(const float* x, int64_t words) {
    __m512 largest = _mm512_setzero_ps();
    __mmask16 bad = 0;
    for (int64_t i = 0; i < words * FDB_WORD_INPUTS; i += 16) {
        __m512 magnitude = _mm512_abs_ps(_mm512_loadu_ps(x + i));
        bad |= _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
        largest = _mm512_max_ps(largest, magnitude);
    }
    return bad ? NAN : _mm512_reduce_max_ps(largest);
}

INLINE __m512 load_scales(const uint8_t* halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)halves));
}

TARGET static void add_offsets(const uint8_t* halves, int64_t groups, const float* sums,
                               int64_t columns, float* y) {
    for (int64_t c = 0; c < columns; c++, y += FDB_BLOCK_ROWS) {
        __m512 total[FDB_BLOCK_TILES];
#pragma GCC unroll 4
        for (int i = 0; i < FDB_BLOCK_TILES; i++) total[i] = _mm512_loadu_ps(y + i * FDB_TILE_ROWS);
        for (int64_t group = 0; group < groups; group++) {
            const uint8_t* own = halves + group * FDB_BLOCK_ROWS * 2;
            __m512 sum = _mm512_set1_ps(sums[group * columns + c]);
#pragma GCC unroll 4
            for (int i = 0; i < FDB_BLOCK_TILES; i++)
                total[i] = _mm512_fmadd_ps(sum, load_scales(own + i * FDB_TILE_ROWS * 2), total[i]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < FDB_BLOCK_TILES; i++) _mm512_storeu_ps(y + i * FDB_TILE_ROWS, total[i]);
    }
}

#endif

extern const fdb_kernel fdb_avx512_integer;
extern const fdb_kernel fdb_avx512_exact;

#endif
