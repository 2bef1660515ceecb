/* Rows in 8 bits: sign-extended to 16, then two products and an addition by vpdpwssd. */
#include "avx512.h"
#include "int8.h"

#if defined(__x86_64__)

enum { VECTOR = 32, AHEAD = 3072 };

/* Integer sums of one stretch, 16 lanes of each row and column. */
INLINE void add_stretch(const int8_t* const* rows, const int16_t* q, int64_t in, int64_t from,
                        int64_t to, int columns, __m512i sums[INT8_COLUMNS][INT8_ROWS]) {
    for (int64_t i = from; i < to; i += VECTOR) {
        __mmask32 there = to - i >= VECTOR ? 0xffffffffu : (1u << (to - i)) - 1;
        /* The rows follow each other: memory is asked for in its own order. */
        _mm_prefetch((const char*)rows[0] + AHEAD + i * INT8_ROWS, _MM_HINT_T0);
        _mm_prefetch((const char*)rows[0] + AHEAD + i * INT8_ROWS + 64, _MM_HINT_T0);
        __m512i w[INT8_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < INT8_ROWS; r++) {
            w[r] = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, rows[r] + i));
        }
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            __m512i x = _mm512_maskz_loadu_epi16(there, q + c * in + i);
#pragma GCC unroll 4
            for (int r = 0; r < INT8_ROWS; r++)
                sums[c][r] = _mm512_dpwssd_epi32(sums[c][r], w[r], x);
        }
    }
}

/* One column, row by row: memory is read in its own order. */
INLINE void rows_of_one(const int8_t* const* rows, const int16_t* q, const float* steps, int64_t in,
                        float* y) {
    for (int r = 0; r < INT8_ROWS; r++) {
        __m512 total = _mm512_setzero_ps();
        const float* step = steps;
        for (int64_t from = 0; from < in; from += INT8_STRETCH) {
            int64_t to = fdb_min(in, from + INT8_STRETCH), i = from;
            __m512i even = _mm512_setzero_si512(), odd = even;
            for (; i + 2 * VECTOR <= to; i += 2 * VECTOR) {
                _mm_prefetch((const char*)rows[r] + i + AHEAD, _MM_HINT_T0);
                __m512i w0 =
                    _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(rows[r] + i)));
                __m512i w1 = _mm512_cvtepi8_epi16(
                    _mm256_loadu_si256((const __m256i*)(rows[r] + i + VECTOR)));
                even = _mm512_dpwssd_epi32(even, w0, _mm512_loadu_si512(q + i));
                odd = _mm512_dpwssd_epi32(odd, w1, _mm512_loadu_si512(q + i + VECTOR));
            }
            for (; i < to; i += VECTOR) {
                __mmask32 there = to - i >= VECTOR ? 0xffffffffu : (1u << (to - i)) - 1;
                __m512i w0 = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, rows[r] + i));
                even = _mm512_dpwssd_epi32(even, w0, _mm512_maskz_loadu_epi16(there, q + i));
            }
            total = _mm512_fmadd_ps(_mm512_set1_ps(*step++),
                                    _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), total);
        }
        y[r] = _mm512_reduce_add_ps(total);
    }
}

INLINE void rows_of(const int8_t* const* rows, const int16_t* q, const float* steps, int64_t in,
                    int columns, float* y) {
    __m512 totals[INT8_COLUMNS][INT8_ROWS] = {{{0}}};
    int64_t stretches = int8_stretches(in);
    for (int64_t s = 0; s < stretches; s++) {
        __m512i sums[INT8_COLUMNS][INT8_ROWS] = {{{0}}};
        add_stretch(rows, q, in, s * INT8_STRETCH, fdb_min(in, (s + 1) * INT8_STRETCH), columns,
                    sums);
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++)
#pragma GCC unroll 4
            for (int r = 0; r < INT8_ROWS; r++)
                totals[c][r] = _mm512_fmadd_ps(_mm512_set1_ps(steps[c * stretches + s]),
                                               _mm512_cvtepi32_ps(sums[c][r]), totals[c][r]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++)
#pragma GCC unroll 4
        for (int r = 0; r < INT8_ROWS; r++)
            y[c * INT8_ROWS + r] = _mm512_reduce_add_ps(totals[c][r]);
}

TARGET void int8_rows_avx512(const int8_t* const* rows, const int16_t* q, const float* steps,
                             int64_t in, int columns, float* y) {
    if (columns == 1)
        rows_of_one(rows, q, steps, in, y);
    else
        rows_of(rows, q, steps, in, INT8_COLUMNS, y);
}

#endif
