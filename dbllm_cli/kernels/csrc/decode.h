/* What a decoded token needs beside products: attention of its one query, the gated activation. */
#ifndef DBLLM_DECODE_H
#define DBLLM_DECODE_H

#include <stdint.h>

enum { ATTENTION_MAX_DIM = 512 };

/* The heads of queries that share keys and values. */
typedef struct {
    int bfloat16; /* keys and values: bfloat16 or float32 */
    int64_t queries, positions, dim;
    const char *key, *value;        /* of the first position */
    int64_t key_bytes, value_bytes; /* from position to position */
    const uint8_t* mask;            /* [positions], 0 hides one; or NULL */
    const float* query;             /* [queries][dim], scaled */
    float *scores, *out;            /* [queries][positions], [queries][dim] */
} attention_head;

typedef void attention(const attention_head* head);

attention attention_portable;
attention attention_avx2;
attention attention_avx512;

/* gate := silu(gate) * up, where silu(x) = x / (1 + e^-x). */
typedef void gated_activation(float* gate, const float* up, int64_t count);

gated_activation gated_silu_portable;
gated_activation gated_silu_avx2;
gated_activation gated_silu_avx512;

#endif
