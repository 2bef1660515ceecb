/* The attention of decode.h, as loops that compilers make vectors of. */
#ifndef DBLLM_ATTENTION_H
#define DBLLM_ATTENTION_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "activation.h"
#include "floats.h"

enum { ATTENTION_LANES = 16, ATTENTION_ROWS = 4 };

/* Vectors wider than the target has are passed in memory, and only from function to inlined one. */
#pragma GCC diagnostic ignored "-Wpsabi"

DECODE_INLINE void attention_load(const char* row, int bfloat16, int64_t dim, float* to) {
    if (bfloat16)
        for (int64_t i = 0; i < dim; i++) to[i] = fdb_from_bfloat16(((const uint16_t*)row)[i]);
    else
        memcpy(to, row, (size_t)dim * sizeof *to);
}

typedef float attention_lanes __attribute__((vector_size(ATTENTION_LANES * 4)));
typedef float attention_half __attribute__((vector_size(ATTENTION_LANES * 2)));
typedef float attention_quarter __attribute__((vector_size(ATTENTION_LANES)));

DECODE_INLINE float attention_sum(attention_lanes lanes) {
    attention_half halves[2];
    attention_quarter quarters[2];
    memcpy(halves, &lanes, sizeof lanes);
    attention_half half = halves[0] + halves[1];
    memcpy(quarters, &half, sizeof half);
    attention_quarter sum = quarters[0] + quarters[1];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

DECODE_INLINE attention_lanes attention_load_lanes(const float* from) {
    attention_lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

DECODE_INLINE float attention_dot(const float* x, const float* y, int64_t dim) {
    attention_lanes sums = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + ATTENTION_LANES <= dim; i += ATTENTION_LANES)
        sums += attention_load_lanes(x + i) * attention_load_lanes(y + i);
    for (; i < dim; i++) rest += x[i] * y[i];
    return attention_sum(sums) + rest;
}

DECODE_INLINE float attention_largest(const float* scores, int64_t count) {
    float lanes[ATTENTION_LANES], largest = -INFINITY;
    int64_t i = 0;
    for (int lane = 0; lane < ATTENTION_LANES; lane++) lanes[lane] = -INFINITY;
    for (; i + ATTENTION_LANES <= count; i += ATTENTION_LANES)
        for (int lane = 0; lane < ATTENTION_LANES; lane++)
            lanes[lane] = scores[i + lane] > lanes[lane] ? scores[i + lane] : lanes[lane];
    for (; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (int lane = 0; lane < ATTENTION_LANES; lane++)
        largest = lanes[lane] > largest ? lanes[lane] : largest;
    return largest;
}

/* Scores to weights that are not yet divided by their sum, which is returned. */
DECODE_INLINE float attention_weights(float* scores, int64_t count) {
    attention_lanes sums = {0};
    float largest = attention_largest(scores, count), rest = 0;
    if (largest == -INFINITY) largest = 0; /* all hidden, or NaN */
    for (int64_t i = 0; i < count; i++) scores[i] = decode_exp(scores[i] - largest);
    int64_t i = 0;
    for (; i + ATTENTION_LANES <= count; i += ATTENTION_LANES)
        sums += attention_load_lanes(scores + i);
    for (; i < count; i++) rest += scores[i];
    return attention_sum(sums) + rest;
}

DECODE_INLINE void attention_of(const attention_head* h, int bfloat16) {
    float rows[ATTENTION_ROWS][ATTENTION_MAX_DIM];
    int64_t dim = h->dim, positions = h->positions;
    for (int64_t p = 0; p < positions; p++) {
        int hidden = h->mask != NULL && !h->mask[p];
        if (!hidden) attention_load(h->key + p * h->key_bytes, bfloat16, dim, rows[0]);
        for (int64_t q = 0; q < h->queries; q++)
            h->scores[q * positions + p] =
                hidden ? -INFINITY : attention_dot(h->query + q * dim, rows[0], dim);
    }
    float totals[h->queries];
    for (int64_t q = 0; q < h->queries; q++)
        totals[q] = attention_weights(h->scores + q * positions, positions);
    memset(h->out, 0, (size_t)(h->queries * dim) * sizeof *h->out);
    for (int64_t p = 0; p < positions; p += ATTENTION_ROWS) {
        int64_t count = positions - p < ATTENTION_ROWS ? positions - p : ATTENTION_ROWS;
        for (int64_t r = 0; r < count; r++)
            attention_load(h->value + (p + r) * h->value_bytes, bfloat16, dim, rows[r]);
        for (int64_t r = count; r < ATTENTION_ROWS; r++)
            memset(rows[r], 0, (size_t)dim * sizeof(float));
        for (int64_t q = 0; q < h->queries; q++) {
            const float* weights = h->scores + q * positions + p;
            float w[ATTENTION_ROWS] = {0}, *out = h->out + q * dim;
            for (int64_t r = 0; r < count; r++) w[r] = weights[r];
            for (int64_t i = 0; i < dim; i++)
                out[i] +=
                    w[0] * rows[0][i] + w[1] * rows[1][i] + w[2] * rows[2][i] + w[3] * rows[3][i];
        }
    }
    for (int64_t q = 0; q < h->queries; q++)
        for (int64_t i = 0; i < dim; i++) h->out[q * dim + i] /= totals[q] == 0 ? 1 : totals[q];
}

DECODE_INLINE void attention_any(const attention_head* h) {
    if (h->bfloat16)
        attention_of(h, 1);
    else
        attention_of(h, 0);
}

#endif
