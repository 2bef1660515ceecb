/* A product with rows of 8-bit integers, each followed by its float16 scale: the embeddings.
 *
 * The activations of a column become integers of 16 bits with one step for INT8_STRETCH inputs.
 */
#ifndef DBLLM_INT8_H
#define DBLLM_INT8_H

#include <stdint.h>

enum {
    INT8_SCALE_BYTES = 2,
    INT8_STRETCH = 512, /* so that the integer sum of a stretch fits 32 bits */
    INT8_ROWS = 4,
    INT8_COLUMNS = 4,
};

/* Sums of INT8_ROWS rows over `count` inputs for `columns` (1 or INT8_COLUMNS) columns, whose
 * integers q lie `stride` apart: sums [column][row]. */
typedef void int8_sums(const int8_t* const* rows, const int16_t* q, int64_t stride, int64_t count,
                       int columns, int32_t* sums);

int8_sums int8_sums_portable;
int8_sums int8_sums_avx2;
int8_sums int8_sums_avx512;

/* x [in] to integers q and steps [ceil(in / INT8_STRETCH)]; NaN where an input is not finite. */
void int8_quantize(const float* x, int64_t in, int16_t* q, float* steps);

/* y [column][rows] for the rows `first` up to `last`; the same bytes for any division. */
void int8_product(int8_sums* sums, const uint8_t* weight, const int16_t* q, const float* steps,
                  int64_t in, int64_t columns, int64_t rows, int64_t first, int64_t last, float* y);

/* The sums as a loop that compilers make vectors of. */
__attribute__((always_inline)) static inline void int8_plain_sums(const int8_t* const* rows,
                                                                  const int16_t* q, int64_t stride,
                                                                  int64_t count, int columns,
                                                                  int32_t* sums) {
    const int8_t *w0 = rows[0], *w1 = rows[1], *w2 = rows[2], *w3 = rows[3];
    for (int c = 0; c < columns; c++, q += stride, sums += INT8_ROWS) {
        int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (int64_t i = 0; i < count; i++) {
            s0 += w0[i] * q[i];
            s1 += w1[i] * q[i];
            s2 += w2[i] * q[i];
            s3 += w3[i] * q[i];
        }
        sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
    }
}

#endif
