/* What training needs beside products: dense weights from latent ones and the gradients back, and
 * the loss of distillation. */
#ifndef DBLLM_TRAINING_H
#define DBLLM_TRAINING_H

#include <stdint.h>

/* A group of one row: its latent weights, and its scales with alpha2 <= 0 <= alpha1. */
typedef struct {
    const float* latent;
    int64_t count;
    float alpha1, alpha2;
    int bfloat16; /* dense weights and their gradient: bfloat16 or float32 */
} latent_group;

/* To `dense`, the nearest level of every latent weight. */
typedef void latent_levels(const latent_group* group, void* dense);

/* From the gradient of the dense weights that of the latent ones, 0 farther than half a step beyond
 * the outer levels, and those of alpha1 and alpha2: the sums over each plane. */
typedef void latent_gradients(const latent_group* group, const void* dense, float* latent,
                              float* alpha1, float* alpha2);

/* A token's logits, and what comes of them in nats. */
typedef struct {
    const void *student, *teacher;
    int64_t count;
    int bfloat16; /* logits and gradient: bfloat16 or float32 */
    float cross_entropy, teacher_entropy, student_entropy;
    void* gradient; /* of the cross-entropy, to the student's logits; or NULL */
} distillation_token;

typedef void distillation(distillation_token* token);

latent_levels latent_levels_portable;
latent_levels latent_levels_avx2;
latent_levels latent_levels_avx512;

latent_gradients latent_gradients_portable;
latent_gradients latent_gradients_avx2;
latent_gradients latent_gradients_avx512;

distillation distillation_portable;
distillation distillation_avx2;
distillation distillation_avx512;

#endif
