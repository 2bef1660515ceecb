/* What training needs beside products: dense weights from latent ones or from planes, the gradients
 * back, and the loss of distillation. */
#ifndef DBLLM_TRAINING_H
#define DBLLM_TRAINING_H

#include <stdint.h>

/* alpha2 <= 0 <= alpha1 and the offset of a group; or their gradients. */
typedef struct {
    float alpha1, alpha2, beta;
} group_scales;

/* A group of one row: its latent weights and the scales whose levels part them into cells, or its
 * fixed planes; and its scales. */
typedef struct {
    const float* latent;
    const uint8_t *plane1, *plane2; /* of the group's first weight, least significant bit first */
    int64_t count;
    group_scales scales, cells;
    int bfloat16; /* dense weights and their gradient: bfloat16 or float32 */
} training_group;

/* To `dense`, the level of every latent weight's cell. */
typedef void latent_levels(const training_group* group, void* dense);

/* From the gradient of the dense weights that of the latent ones, 0 farther than half a step beyond
 * the cells' outer levels, and those of alpha1, alpha2 and beta: the sums over each plane, and over
 * all. */
typedef group_scales latent_gradients(const training_group* group, const void* dense,
                                      float* latent);

/* To `dense`, the level of every weight. */
typedef void plane_levels(const training_group* group, void* dense);

/* From the gradient of the dense weights that of the scales. */
typedef group_scales plane_gradients(const training_group* group, const void* dense);

/* A token's logits, and what comes of them in nats. */
typedef struct {
    const void *student, *teacher;
    int64_t count;
    int bfloat16; /* logits and gradient: bfloat16 or float32 */
    float cross_entropy, teacher_entropy, student_entropy;
    void* gradient; /* of the cross-entropy, to the student's logits; or NULL */
} distillation_token;

typedef void distillation(distillation_token* token);

/* For one instruction set. */
typedef struct {
    latent_levels* levels;
    latent_gradients* gradients;
    plane_levels* plane_levels;
    plane_gradients* plane_gradients;
    distillation* distil;
} training_kernels;

extern const training_kernels training_portable;
extern const training_kernels training_avx2;
extern const training_kernels training_avx512;

#endif
