/* dbllm::attend_one_cpu(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor
 */
#include <string.h>

#include "attention.h"
#include "fdb.h"
#include "torch_abi.h"

enum { QUERY, KEY, VALUE, MASK, ARGUMENTS };
enum { GRAIN = 1 << 15 }; /* multiplications: less is not worth waking another thread */

typedef struct {
    array in[ARGUMENTS];
    int64_t shared; /* heads of queries for one of keys */
    float *query, *scores, *out;
} call;

static const char* head_of(const array* x, int64_t sequence, int64_t head) {
    return x->data + (sequence * x->strides[0] + head * x->strides[1]) * array_element_bytes(x);
}

static void attend(int64_t first, int64_t last, void* context) {
    const call* c = context;
    const array *key = &c->in[KEY], *value = &c->in[VALUE], *mask = &c->in[MASK];
    int64_t heads = key->sizes[1], positions = key->sizes[2], dim = key->sizes[3];
    for (int64_t i = first; i < last; i++) {
        int64_t sequence = i / heads, head = i % heads, at = i * c->shared;
        attention_head h = {
            .bfloat16 = key->type == BFLOAT16,
            .queries = c->shared,
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

/* query [batch][heads][1][dim] -> [batch][1][heads][dim] */
void attend_one_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    call c;
    double scale;
    memcpy(&scale, &stack[ARGUMENTS], sizeof scale);
    for (int i = 0; i < ARGUMENTS; i++) array_describe((tensor)stack[i], &c.in[i]);
    array *query = &c.in[QUERY], *key = &c.in[KEY];
    int64_t batch = query->sizes[0], heads = query->sizes[1], dim = query->sizes[3];
    int64_t tasks = batch * key->sizes[1], positions = key->sizes[2];
    c.shared = heads / key->sizes[1];
    size_t vectors = work_bytes(batch * heads * dim * 4);
    char* memory = work_memory(2 * vectors + work_bytes(batch * heads * positions * 4));
    c.query = (float*)memory;
    c.out = (float*)(memory + vectors);
    c.scores = (float*)(memory + 2 * vectors);
    for (int64_t i = 0; i < batch * heads; i++) array_read(query, i, dim, c.query + i * dim);
    for (int64_t i = 0; i < batch * heads * dim; i++) c.query[i] *= (float)scale;
    torch.parallel_for(0, tasks, 1 + GRAIN / (c.shared * positions * dim), attend, &c);
    int64_t sizes[] = {batch, 1, heads, dim};
    char* data;
    tensor result = array_new(sizes, 4, query->type, &data);
    array_write(c.out, batch * heads * dim, 1, query->type, data, 0);
    for (int i = 0; i < ARGUMENTS; i++) torch.delete_tensor((tensor)stack[i]);
    stack[0] = (stable_value)result;
}
