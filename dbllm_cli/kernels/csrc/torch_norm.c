/* dbllm::rms_norm_cpu(Tensor x, Tensor weight, float eps) -> Tensor */
#include <math.h>
#include <string.h>

#include "floats.h"
#include "torch_abi.h"

enum { LANES = 16, GRAIN = 1 << 14 };

typedef struct {
    array x, weight;
    float eps;
    char* out;
} call;

/* Rounded to the array's type and back, as the plain formula does before it scales. */
static void round_to(element_type type, float* x, int64_t count) {
    if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) x[i] = fdb_from_bfloat16(fdb_to_bfloat16(x[i]));
    else if (type == FLOAT16)
        for (int64_t i = 0; i < count; i++) x[i] = fdb_from_float16(fdb_to_float16(x[i]));
}

static float mean_of_squares(const float* x, int64_t count) {
    float lanes[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] += x[i + lane] * x[i + lane];
    for (; i < count; i++) sum += x[i] * x[i];
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum / (float)count;
}

static void normalize(int64_t first, int64_t last, void* context) {
    const call* c = context;
    int64_t count = c->weight.sizes[0];
    float* row = work_memory(2 * work_bytes(count * 4));
    float* weight = row + work_bytes(count * 4) / 4;
    array_read(&c->weight, 0, count, weight);
    for (int64_t r = first; r < last; r++) {
        array_read(&c->x, r, count, row);
        float factor = 1 / sqrtf(mean_of_squares(row, count) + c->eps);
        for (int64_t i = 0; i < count; i++) row[i] *= factor;
        round_to(c->x.type, row, count);
        for (int64_t i = 0; i < count; i++) row[i] *= weight[i];
        array_write(row, count, 1, c->x.type, c->out, r * count);
    }
}

void rms_norm_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    call c;
    double eps;
    int64_t rows;
    memcpy(&eps, &stack[2], sizeof eps);
    array_describe((tensor)stack[0], &c.x);
    array_describe((tensor)stack[1], &c.weight);
    c.eps = (float)eps;
    tensor result = array_like(&c.x, c.weight.sizes[0], &rows, &c.out);
    torch.parallel_for(0, rows, 1 + GRAIN / c.weight.sizes[0], normalize, &c);
    torch.delete_tensor((tensor)stack[0]);
    torch.delete_tensor((tensor)stack[1]);
    stack[0] = (stable_value)result;
}
