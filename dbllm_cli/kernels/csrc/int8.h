/* A product with rows of 8-bit integers, each followed by its float16 scale: the embeddings. */
#ifndef DBLLM_INT8_H
#define DBLLM_INT8_H

#include <stdint.h>

enum {
    INT8_SCALE_BYTES = 2,
    INT8_STRETCH = 512, /* inputs that share a step: their integer sum fits 32 bits */
};

/* x [in] to integers q of 16 bits and steps [ceil(in / 512)]; NaN where an input is not finite. */
void int8_quantize(const float *x, int64_t in, int16_t *q, float *steps);

/* y[row] of `columns` columns, y [column][rows], for the rows `first` up to `last`. */
void int8_product(const uint8_t *weight, const int16_t *q, const float *steps, int64_t in,
                  int64_t columns, int64_t rows, int64_t first, int64_t last, float *y);

#endif
