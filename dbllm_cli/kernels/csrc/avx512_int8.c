/* Rows in 8 bits: sign-extended to 16, then two products and an addition by vpdpwssd. */
#include "avx512.h"
#include "int8.h"

#if defined(__x86_64__)

INLINE void sums_of(const int8_t* const* rows, const int16_t* q, int64_t stride, int64_t count,
                    int columns, int32_t* sums) {
    __m512i totals[INT8_COLUMNS][INT8_ROWS] = {{{0}}};
    for (int64_t i = 0; i < count; i += 32) {
        __mmask32 there = count - i >= 32 ? 0xffffffffu : (1u << (count - i)) - 1;
        __m512i w[INT8_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < INT8_ROWS; r++)
            w[r] = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, rows[r] + i));
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            __m512i x = _mm512_maskz_loadu_epi16(there, q + c * stride + i);
#pragma GCC unroll 4
            for (int r = 0; r < INT8_ROWS; r++)
                totals[c][r] = _mm512_dpwssd_epi32(totals[c][r], w[r], x);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++)
#pragma GCC unroll 4
        for (int r = 0; r < INT8_ROWS; r++)
            sums[c * INT8_ROWS + r] = _mm512_reduce_add_epi32(totals[c][r]);
}

TARGET void int8_sums_avx512(const int8_t* const* rows, const int16_t* q, int64_t stride,
                             int64_t count, int columns, int32_t* sums) {
    if (columns == 1)
        sums_of(rows, q, stride, count, 1, sums);
    else
        sums_of(rows, q, stride, count, INT8_COLUMNS, sums);
}

#endif
