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

/* INT8_ROWS rows times `columns` (1 or INT8_COLUMNS) columns of integers q [column][in] and steps
 * [column][stretch]: y [column][row]. */
typedef void int8_rows(const int8_t* const* rows, const int16_t* q, const float* steps, int64_t in,
                       int columns, float* y);

int8_rows int8_rows_portable;
int8_rows int8_rows_avx2;
int8_rows int8_rows_avx512;

/* x [in] to integers q and steps [ceil(in / INT8_STRETCH)]; NaN where an input is not finite. */
void int8_quantize(const float* x, int64_t in, int16_t* q, float* steps);

/* y [column][rows] for the rows `first` up to `last`; the same bytes for any division. */
void int8_product(int8_rows* multiply, const uint8_t* weight, const int16_t* q, const float* steps,
                  int64_t in, int64_t columns, int64_t rows, int64_t first, int64_t last, float* y);

static inline int64_t int8_stretches(int64_t in) { return (in + INT8_STRETCH - 1) / INT8_STRETCH; }

/* As loops that compilers make vectors of; row by row, since memory is fastest in its own order. */
__attribute__((always_inline)) static inline void int8_plain_rows(const int8_t* const* rows,
                                                                  const int16_t* q,
                                                                  const float* steps, int64_t in,
                                                                  int columns, float* y) {
    for (int r = 0; r < INT8_ROWS; r++)
        for (int c = 0; c < columns; c++) {
            const float* step = steps + c * int8_stretches(in);
            float total = 0;
            for (int64_t from = 0; from < in; from += INT8_STRETCH) {
                int64_t to = in < from + INT8_STRETCH ? in : from + INT8_STRETCH;
                int32_t sum = 0;
                for (int64_t i = from; i < to; i++) sum += rows[r][i] * q[c * in + i];
                total += *step++ * (float)sum;
            }
            y[c * INT8_ROWS + r] = total;
        }
}

#endif
