/* Sums in lanes, which compilers make vectors of, as latents.h and distillation.h add them up. */
#ifndef DBLLM_TRAINING_LANES_H
#define DBLLM_TRAINING_LANES_H

#include "activation.h"

enum { TRAINING_LANES = 16 };

DECODE_INLINE float training_total(const float* lanes) {
    float total = 0;
    for (int lane = 0; lane < TRAINING_LANES; lane++) total += lanes[lane];
    return total;
}

#endif
