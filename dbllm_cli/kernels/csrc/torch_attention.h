/* Attention of one query a sequence, on torch's threads. */
#ifndef DBLLM_TORCH_ATTENTION_H
#define DBLLM_TORCH_ATTENTION_H

#include "torch_abi.h"

typedef struct {
    int64_t batch, heads;
    const float* query; /* [batch][heads][dim], scaled */
    array key, value;   /* [batch][key heads][positions][dim] */
    array mask;         /* bool [batch or 1][1][1][positions], or [0][0] for none */
    float* out;         /* [batch][heads][dim] */
    float* scores;
} attention_call;

void attention_run(attention_call* call);

#endif
