/* dbllm::attend_one_cpu(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor
 */
#include "torch_attention.h"

#include <string.h>

#include "fdb.h"

enum { GRAIN = 1 << 15 }; /* multiplications: less is not worth waking another thread */

static const char* head_of(const array* x, int64_t sequence, int64_t head) {
    return x->data + (sequence * x->strides[0] + head * x->strides[1]) * array_element_bytes(x);
}

static void attend(int64_t first, int64_t last, void* context) {
    const attention_call* c = context;
    const array *key = &c->key, *value = &c->value, *mask = &c->mask;
    int64_t heads = key->sizes[1], positions = key->sizes[2], dim = key->sizes[3];
    int64_t shared = c->heads / heads;
    for (int64_t i = first; i < last; i++) {
        int64_t sequence = i / heads, head = i % heads, at = i * shared;
        attention_head h = {
            .bfloat16 = key->type == BFLOAT16,
            .queries = shared,
            .positions = positions,
            .dim = dim,
            .key = head_of(key, sequence, head),
            .value = head_of(value, sequence, head),
            .key_bytes = key->strides[2] * array_element_bytes(key),
            .value_bytes = value->strides[2] * array_element_bytes(value),
            .query = c->query + at * dim,
            .scores = c->scores + at * positions,
            .out = c->out + at * dim,
        };
        if (mask->sizes[1] > 0)
            h.mask = (const uint8_t*)mask->data + (mask->sizes[0] > 1 ? sequence : 0) * positions;
        fdb_chosen->attention(&h);
    }
}

void attention_run(attention_call* c) {
    int64_t key_heads = c->key.sizes[1], positions = c->key.sizes[2], dim = c->key.sizes[3];
    c->scores = work_memory(WORK_ATTENTION, work_bytes(c->batch * c->heads * positions * 4));
    int64_t work = c->heads / key_heads * positions * dim;
    torch.parallel_for(0, c->batch * key_heads, 1 + GRAIN / work, attend, c);
}

void attend_one_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    array query;
    attention_call c;
    double scale;
    char* data;
    memcpy(&scale, &stack[4], sizeof scale);
    array_describe((tensor)stack[0], &query);
    array_describe((tensor)stack[1], &c.key);
    array_describe((tensor)stack[2], &c.value);
    array_describe((tensor)stack[3], &c.mask);
    c.batch = query.sizes[0], c.heads = query.sizes[1];
    int64_t rows = c.batch * c.heads, dim = query.sizes[3];
    float* own = work_memory(WORK_INPUTS, work_bytes(2 * rows * dim * 4));
    for (int64_t i = 0; i < rows; i++) array_read(&query, i, dim, own + i * dim);
    for (int64_t i = 0; i < rows * dim; i++) own[i] *= (float)scale;
    c.query = own, c.out = own + rows * dim;
    attention_run(&c);
    tensor result = array_new((int64_t[]){c.batch, 1, c.heads, dim}, 4, query.type, &data);
    array_write(c.out, rows * dim, 1, query.type, data, 0);
    for (int i = 0; i < 4; i++) torch.delete_tensor((tensor)stack[i]);
    stack[0] = (stable_value)result;
}
