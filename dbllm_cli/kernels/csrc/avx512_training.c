#include "distillation.h"
#include "latents.h"
#include "planes.h"
#include "training.h"

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,fma,prefer-vector-width=512")))

TARGET static void levels(const training_group* group, void* dense) {
    latent_levels_any(group, dense);
}

TARGET static group_scales gradients(const training_group* group, const void* dense,
                                     float* latent) {
    return latent_gradients_any(group, dense, latent);
}

TARGET static void of_planes(const training_group* group, void* dense) {
    plane_levels_any(group, dense);
}

TARGET static group_scales to_scales(const training_group* group, const void* dense) {
    return plane_gradients_any(group, dense);
}

TARGET static void distil(distillation_token* token) { distillation_any(token); }

const training_kernels training_avx512 = {levels, gradients, of_planes, to_scales, distil};

#endif
