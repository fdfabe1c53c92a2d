// The operators as AOTInductor packages call them (ops/packaged.py): float32, images in channels_last, the taps of a
// pixel side by side. Linked into each package, so that it needs neither Python nor a file beside it. Compiled for any
// processor, unlike the kernels: what NEEDS names is looked for when the package is loaded.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdio>
#include <cstdlib>

#include "driver.h"

extern "C" {
// 0, or 1 where a buffer could not be had: AOTI_TORCH_SUCCESS and AOTI_TORCH_FAILURE
int involution_forward_float(const Problem*, const float* x, const float* kernel, float* out);
int involution_backward_float(const Problem*, const float* grad, const float* x, const float* kernel, float* grad_x,
                              float* grad_kernel);
int involution_folded_forward_float(const Problem*, const float* x, const float* packed, float* out);
int involution_bottleneck_forward_float(const Problem*, const float* x, const float* packed, float* out);
}

static_assert(AOTI_TORCH_SUCCESS == 0 && AOTI_TORCH_FAILURE == 1);

namespace {
#if defined(__x86_64__)
__attribute__((constructor)) void check_processor() {
    __builtin_cpu_init();
#define NEED(FEATURE)                                                                                                 \
    if (!__builtin_cpu_supports(FEATURE)) {                                                                           \
        std::fprintf(stderr, "error: this package was compiled for a processor with " FEATURE                         \
                             ", which this one lacks; export it on a machine like this one, or with "                 \
                             "ATEN_CPU_CAPABILITY=avx2 in the environment for any processor with AVX2\n");            \
        std::_Exit(2);                                                                                                \
    }
    NEEDS
}
#endif

struct Tensor {
    int64_t *sizes, *strides;
    void* data;

    explicit Tensor(AtenTensorHandle handle) {
        aoti_torch_get_sizes(handle, &sizes);
        aoti_torch_get_strides(handle, &strides);
        aoti_torch_get_data_ptr(handle, &data);
    }
    const float* floats() const { return static_cast<const float*>(data); }
};

Problem describe(const Tensor& x, int64_t groups, int64_t size, int64_t stride, int64_t padding, int64_t dilation) {
    Problem p{};
    p.batch = x.sizes[0], p.channels = x.sizes[1], p.height = x.sizes[2], p.width = x.sizes[3];
    p.x_batch = x.strides[0], p.x_row = x.strides[2], p.x_pixel = x.strides[3];
    p.groups = groups, p.size = size, p.stride = stride, p.padding = padding, p.dilation = dilation;
    p.out_height = (p.height + 2 * padding - dilation * (size - 1) - 1) / stride + 1;
    p.out_width = (p.width + 2 * padding - dilation * (size - 1) - 1) / stride + 1;
    p.threads = omp_get_max_threads();  // torch sets it
    return p;
}

void describe_taps(Problem& p, const int64_t* strides) {  // of (B, G, K, K, Ho, Wo)
    p.kernel_batch = strides[0], p.kernel_row = strides[4], p.kernel_pixel = strides[5], p.kernel_tap = 1;
}

template <size_t N>
float* allocate(const int64_t (&sizes)[N], const int64_t (&strides)[N], AtenTensorHandle* out) {
    const int32_t type = aoti_torch_dtype_float32(), cpu = aoti_torch_device_type_cpu();
    if (aoti_torch_empty_strided(N, sizes, strides, type, cpu, 0, out)) return nullptr;
    return static_cast<float*>(Tensor(*out).data);
}

float* allocate_image(const Problem& p, int64_t channels, AtenTensorHandle* out) {
    const int64_t row = p.out_width * channels;
    return allocate<4>({p.batch, channels, p.out_height, p.out_width}, {p.out_height * row, 1, row, channels}, out);
}
}  // namespace

extern "C" {
AOTITorchError aoti_torch_cpu_folded_involution2d(AtenTensorHandle input, AtenTensorHandle packed, int64_t hidden,
                                                  int64_t groups, int64_t size, int64_t stride, int64_t dilation,
                                                  AtenTensorHandle* out) {
    const Tensor x(input);
    Problem p = describe(x, groups, size, stride, dilation * (size - 1) / 2, dilation);
    p.hidden = hidden;
    float* to = allocate_image(p, p.channels, out);
    if (!to) return AOTI_TORCH_FAILURE;
    return involution_folded_forward_float(&p, x.floats(), Tensor(packed).floats(), to);
}

AOTITorchError aoti_torch_cpu_folded_bottleneck2d(AtenTensorHandle input, AtenTensorHandle packed, int64_t width,
                                                  int64_t out_channels, int64_t projected, int64_t hidden,
                                                  int64_t groups, int64_t size, int64_t stride, int64_t dilation,
                                                  AtenTensorHandle* out) {
    const Tensor x(input);
    Problem p = describe(x, groups, size, stride, dilation * (size - 1) / 2, dilation);
    p.in_channels = p.channels, p.out_channels = out_channels, p.projected = projected, p.hidden = hidden;
    p.channels = p.x_pixel = width, p.x_row = p.width * width, p.x_batch = p.height * p.x_row;  // of the layer inside
    float* to = allocate_image(p, out_channels, out);
    if (!to) return AOTI_TORCH_FAILURE;
    return involution_bottleneck_forward_float(&p, x.floats(), Tensor(packed).floats(), to);
}

AOTITorchError aoti_torch_cpu_involution2d(AtenTensorHandle input, AtenTensorHandle kernel, int64_t stride,
                                           int64_t padding, int64_t dilation, AtenTensorHandle* out) {
    const Tensor x(input), taps(kernel);
    Problem p = describe(x, taps.sizes[1], taps.sizes[2], stride, padding, dilation);
    describe_taps(p, taps.strides);
    float* to = allocate_image(p, p.channels, out);
    if (!to) return AOTI_TORCH_FAILURE;
    return involution_forward_float(&p, x.floats(), taps.floats(), to);
}

AOTITorchError aoti_torch_cpu_neighbourhood_product(AtenTensorHandle query, AtenTensorHandle key, int64_t size,
                                                    int64_t groups, int64_t stride, int64_t padding, int64_t dilation,
                                                    AtenTensorHandle* out) {
    const Tensor x(key);
    Problem p = describe(x, groups, size, stride, padding, dilation);
    const int64_t pixel = groups * size * size, row = p.out_width * pixel;
    const int64_t strides[] = {p.out_height * row, size * size, size, 1, row, pixel};
    describe_taps(p, strides);
    float* to = allocate<6>({p.batch, groups, size, size, p.out_height, p.out_width}, strides, out);
    if (!to) return AOTI_TORCH_FAILURE;
    return involution_backward_float(&p, Tensor(query).floats(), x.floats(), nullptr, nullptr, to);
}
}
