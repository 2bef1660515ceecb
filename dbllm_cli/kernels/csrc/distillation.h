/* The distillation of training.h, as loops that compilers make vectors of. */
#ifndef DBLLM_DISTILLATION_H
#define DBLLM_DISTILLATION_H

#include <math.h>

#include "activation.h"
#include "floats.h"
#include "training.h"
#include "training_lanes.h"

/* A softmax: weights e^(x - largest), their sum, and the sum of each times x. */
typedef struct {
    float largest, sum, moment;
} distillation_softmax;

DECODE_INLINE float distillation_largest(const void* logits, int64_t count, int bfloat16) {
    float lanes[TRAINING_LANES], largest = -INFINITY;
    int64_t i = 0;
    for (int lane = 0; lane < TRAINING_LANES; lane++) lanes[lane] = -INFINITY;
    for (; i + TRAINING_LANES <= count; i += TRAINING_LANES)
        for (int lane = 0; lane < TRAINING_LANES; lane++) {
            float x = fdb_float_at(logits, i + lane, bfloat16);
            lanes[lane] = x > lanes[lane] ? x : lanes[lane];
        }
    for (; i < count; i++) {
        float x = fdb_float_at(logits, i, bfloat16);
        largest = x > largest ? x : largest;
    }
    for (int lane = 0; lane < TRAINING_LANES; lane++)
        largest = lanes[lane] > largest ? lanes[lane] : largest;
    return largest;
}

/* Of `logits`; `crossed` is the sum of each weight times the logit of `other`. */
DECODE_INLINE distillation_softmax distillation_sums(const void* logits, const void* other,
                                                     int64_t count, int bfloat16, float* crossed) {
    float sum[TRAINING_LANES] = {0}, moment[TRAINING_LANES] = {0};
    float cross[TRAINING_LANES] = {0};
    distillation_softmax s = {.largest = distillation_largest(logits, count, bfloat16)};
    int64_t i = 0;
    for (; i + TRAINING_LANES <= count; i += TRAINING_LANES)
        for (int lane = 0; lane < TRAINING_LANES; lane++) {
            float x = fdb_float_at(logits, i + lane, bfloat16), e = decode_exp(x - s.largest);
            sum[lane] += e;
            moment[lane] += e * x;
            cross[lane] += e * fdb_float_at(other, i + lane, bfloat16);
        }
    for (; i < count; i++) {
        float x = fdb_float_at(logits, i, bfloat16), e = decode_exp(x - s.largest);
        sum[0] += e;
        moment[0] += e * x;
        cross[0] += e * fdb_float_at(other, i, bfloat16);
    }
    s.sum = training_total(sum);
    s.moment = training_total(moment);
    *crossed = training_total(cross);
    return s;
}

DECODE_INLINE void distillation_of(distillation_token* t, int bfloat16) {
    float cross, unused;
    distillation_softmax p = distillation_sums(t->teacher, t->student, t->count, bfloat16, &cross);
    distillation_softmax q = distillation_sums(t->student, t->student, t->count, bfloat16, &unused);
    float log_q = q.largest + logf(q.sum), log_p = p.largest + logf(p.sum);
    t->cross_entropy = log_q - cross / p.sum;
    t->teacher_entropy = log_p - p.moment / p.sum;
    t->student_entropy = log_q - q.moment / q.sum;
    if (t->gradient == NULL) return;
    float to_q = 1 / q.sum, to_p = 1 / p.sum;
    for (int64_t i = 0; i < t->count; i++) {
        float x = fdb_float_at(t->student, i, bfloat16);
        float y = fdb_float_at(t->teacher, i, bfloat16);
        float g = decode_exp(x - q.largest) * to_q - decode_exp(y - p.largest) * to_p;
        if (bfloat16)
            ((uint16_t*)t->gradient)[i] = fdb_to_bfloat16(g);
        else
            ((float*)t->gradient)[i] = g;
    }
}

DECODE_INLINE void distillation_any(distillation_token* token) {
    if (token->bfloat16)
        distillation_of(token, 1);
    else
        distillation_of(token, 0);
}

#endif
