// SPDX-License-Identifier: Apache-2.0
// cross_selective_scan on CUDA, by the kernels of the grouped scan: K scans of each of G groups are G * K groups that
// share the images u and dy. They give K images, which one more kernel adds. Where there are more channels than a warp
// holds, they are scanned in slices: one launch each, or by the sm_90 kernels one launch for all K scans and slices of
// a group. Schemas and layouts: csrc/schemas.cpp.
#include "cuda/images/launch.h"
#include "cuda/scan/launch.h"
#include "cuda/scan/sm90/launch.h"
#include "cuda/scan/sm90/select.h"
#include "host/cuda_args.h"
#include "host/explain.h"
#include "host/scan_args.h"
#include "host/stream.h"
#include "ops/scan_kernels.h"
#include "ops/scan_sm90.h"
#include "ops/tma_images.h"

namespace gm {
namespace {

constexpr const char* kOp = "cross_selective_scan";

// Channels [first, first + dim) of every group; states are saved `chunk` tokens apart.
struct Slice {
    int64_t first, dim, chunk;
};

// The slices, and room for the states that they save: `saved` of each plane, of `width` channels of each slice.
struct Slices {
    std::vector<Slice> all;
    int64_t width, saved = 0;

    explicit Slices(const CrossSizes& s) : width(scan_slice_room(s.dim)) {
        for (int64_t first = 0; first < s.dim; first += width) {
            const Slice slice{first, std::min(width, s.dim - first),
                              scan_chunk(std::min(width, s.dim - first), s.states)};
            saved = std::max(saved, scan_saved_states(s.height, s.width, slice.dim, slice.chunk));
            all.push_back(slice);
        }
    }
    int64_t count() const { return static_cast<int64_t>(all.size()); }
    int64_t states_of_one(const CrossSizes& s) const { return s.batch * s.groups * s.scans * saved * s.states * width; }
    int64_t states(const CrossSizes& s) const { return count() * states_of_one(s); }
};

struct CrossInputs {
    Tensor u, dt, A, B, C;
    OptTensor D, dt_weight, dt_bias;
    std::vector<int64_t> directions;
    bool softplus;
    int64_t chunk;
};

CrossSizes check_inputs(const CrossInputs& in) {
    const CrossSizes s =
        check_cross_scan(in.u, in.dt, in.A, in.B, in.C, in.D, in.dt_weight, in.dt_bias, in.directions, in.chunk);
    GM_CHECK(s.groups * s.scans <= kMaxGroups, "the CUDA cross scan takes up to ", kMaxGroups,
             " scans of all groups together, got ", s.groups, " groups in ", s.scans, " directions");
    GM_CHECK(s.dim <= INT32_MAX, "D must be below 2^31, got ", s.dim);
    const int64_t chunk = Slices(s).all[0].chunk;
    GM_CHECK(in.chunk == chunk, "on CUDA chunk must be ", chunk, " for ", s.dim, " channels of ", s.states,
             " states, got ", in.chunk);
    return s;
}

// The parameter `elements` further on, in the dtype of the images or float32.
ParamArg behind(const ParamArg& p, int64_t elements, int64_t image_size) {
    if (p.ptr == nullptr) return p;
    return {static_cast<const char*>(p.ptr) + elements * (p.is_float ? 4 : image_size), p.is_float};
}
ParamOut behind(const ParamOut& p, int64_t elements, int64_t image_size) {
    if (p.ptr == nullptr) return p;
    return {static_cast<char*>(p.ptr) + elements * (p.is_float ? 4 : image_size), p.is_float};
}
ImageArg behind(ImageArg image, int64_t elements, int64_t image_size) {
    image.ptr = static_cast<char*>(image.ptr) + elements * image_size;
    return image;
}

// `t` (batch, H, W, G, K, .), canonical.
ImageArg scans_arg(const Tensor& t) {
    ImageArg image = image_arg(t);
    image.group = t.stride(3), image.scan = t.stride(4);
    return image;
}

// K images like `like`, one after another, or where K is 1 that one alone; each dense, with the order of `like`'s
// strides. Where `pitch` is given, their rows of channels, `channels` long, are so far apart.
struct Parts {
    Tensor values, sum;
    int64_t count, channels, pitch;

    Parts(const Tensor& like, int64_t parts, int64_t row_channels = 1, int64_t row_pitch = 1)
        : sum(like), count(parts), channels(row_channels), pitch(row_pitch) {
        if (!direct()) values = empty({count, elements()}, like.scalar_type(), like);
    }
    bool direct() const { return count <= 1 && pitch == channels; }
    int64_t elements() const { return sum.numel() / channels * pitch; }
    void* data() const { return direct() ? sum.data_ptr() : values.data_ptr(); }
    int64_t stride() const { return direct() ? 0 : elements(); }
    // The first one, of scans that follow one another.
    ImageArg image() const {
        ImageArg first = image_arg(sum);
        for (int64_t* step : {&first.batch, &first.token, &first.group}) *step = *step / channels * pitch;
        first.ptr = data(), first.scan = stride();
        return first;
    }
    void add_up(DType dtype, const CudaContext& context) const {
        if (direct()) return;
        SumImagesArgs args{values.data_ptr(), sum.data_ptr(), sum.numel(), elements(), static_cast<int>(count)};
        if (pitch != channels) args.channels = static_cast<int>(channels), args.pitch = static_cast<int>(pitch);
        check_cuda(launch_sum_images(args, dtype, context.stream()), "cross_selective_scan sums");
    }
};

// What forward and backward have in common; `in` and `param` own what `args` points to.
template <class Args>
void prepare(Args& args, CrossInputs& in, const CrossSizes& s, const Slice& slice, int64_t saved, ParamHolder& param) {
    ScanShape& shape = args.shape;
    shape = {};
    shape.batch = s.batch;
    shape.height = static_cast<int>(s.height), shape.width = static_cast<int>(s.width);
    shape.scans = static_cast<int>(s.scans), shape.groups = static_cast<int>(s.groups * s.scans);
    shape.dim = shape.norm_dim = static_cast<int>(slice.dim), shape.param_dim = static_cast<int>(s.dim);
    shape.states = static_cast<int>(s.states), shape.rank = static_cast<int>(s.rank);
    shape.lanes = scan_lanes(shape.dim);
    shape.softplus = in.softplus;
    for (int64_t g = 0; g < shape.groups; ++g)
        shape.directions[g / 16] |= static_cast<uint32_t>(in.directions[static_cast<size_t>(g % s.scans)])
                                    << (2 * (g % 16));
    const int64_t size = static_cast<int64_t>(in.u.element_size());
    args.u = behind(image_arg(in.u), slice.first, size);
    args.dt = behind(scans_arg(in.dt), s.rank > 0 ? 0 : slice.first, size);
    args.B = scans_arg(in.B), args.C = scans_arg(in.C);
    args.A = behind(param(in.A), slice.first * s.states, size);
    args.D = behind(param(in.D), slice.first, size), args.dt_bias = behind(param(in.dt_bias), slice.first, size);
    args.dt_weight = behind(param(in.dt_weight), slice.first * s.rank, size);
    args.chunk = static_cast<int>(slice.chunk), args.num_chunks = saved;
}

// The part of `args` that belongs to group `g` of G.
ImageArg of_group(const ImageArg& image, int64_t g, int64_t size) {
    ImageArg own = behind(image, g * image.group, size);
    own.group = image.scan, own.scan = 0;
    return own;
}
// Makes the arguments of all slices, which are those of the first one so far, ones of the sm_90 kernels for group `g`:
// its K scans of each slice as groups (sm90/launch.h).
template <class Args>
void take_group(Args& args, const CrossSizes& s, const Slices& slices, int64_t g, int64_t size) {
    ScanShape& shape = args.shape;
    shape.groups = static_cast<int>(s.scans * slices.count()), shape.scans = static_cast<int>(s.scans);
    shape.dim = shape.norm_dim = static_cast<int>(slices.width);
    for (int64_t i = s.scans; i < shape.groups; ++i) {
        const uint32_t direction = shape.directions[i % s.scans / 16] >> (2 * (i % s.scans % 16)) & 3;
        if (i >= s.groups * s.scans) shape.directions[i / 16] |= direction << (2 * (i % 16));
    }
    for (ImageArg* image : {&args.u, &args.dt, &args.B, &args.C}) *image = of_group(*image, g, size);
    const int64_t channels = g * s.scans * s.dim;
    args.A = behind(args.A, channels * s.states, size), args.D = behind(args.D, channels, size);
    args.dt_bias = behind(args.dt_bias, channels, size);
    args.dt_weight = behind(args.dt_weight, channels * s.rank, size);
    if (args.states != nullptr) args.states += g * s.batch * shape.groups * args.num_chunks * s.states * shape.dim;
}

// Why the sm_90 kernels don't take a cross scan, or null where they do.
const char* why_not_sm90(const CrossSizes& s, const CrossInputs& in, const Slices& slices, DType dtype) {
    if (s.scans * slices.count() > kMaxGroups) return "there are too many channels";
    ScanShape shape{};
    shape.dim = static_cast<int>(slices.all[0].dim), shape.param_dim = static_cast<int>(s.dim);
    shape.states = static_cast<int>(s.states), shape.rank = static_cast<int>(s.rank);
    shape.lanes = scan_lanes(shape.dim), shape.softplus = in.softplus;
    return why_not_cross_scan_sm90(shape, dtype);
}
// Replaces images that TMA can't move by copies.
void move_by_tma(const std::vector<Tensor*>& images, const CrossSizes& s, const CudaContext& context) {
    ScanShape shape{};
    shape.batch = s.batch, shape.height = static_cast<int>(s.height), shape.width = static_cast<int>(s.width);
    shape.groups = static_cast<int>(s.groups), shape.dim = static_cast<int>(s.dim);
    TmaImages copies(kOp, shape, context);
    copies.read(images);
    copies.start();
}

bool allows_scan_vectors(std::initializer_list<ImageArg> images, int64_t dim, int64_t size) {
    bool aligned = dim % kVec == 0;
    for (const ImageArg& image : images) aligned = aligned && allows_vectors(image, size) && image.scan % kVec == 0;
    return aligned;
}

// Scans group `g` by the sm_90 kernel.
void launch_sm90(const ScanFwdArgs& all, const CrossSizes& s, const Slices& slices, int64_t g, DType dtype,
                 const CudaContext& context, const Tensor& u) {
    constexpr const char* kName = "cross_selective_scan forward";
    const int64_t size = static_cast<int64_t>(u.element_size());
    ScanFwdSm90Args args{};
    args.scan = all;
    take_group(args.scan, s, slices, g, size);
    args.scan.y = of_group(all.y, g, size);
    GM_CHECK(prepare_cross_scan_fwd_sm90(dtype, args), kName, ": the driver refused a tensor map of u ",
             show(shape_of(u)));
    check_cuda(share_cross_scan_fwd_sm90(args, dtype), kName);
    const Tensor inter_block_state = inter_block_scratch(args, u);
    check_cuda(launch_cross_scan_fwd_sm90(args, dtype, context.stream()), kName);
}

std::tuple<Tensor, Tensor> cross_selective_scan_fwd(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                                                    OptTensor dt_weight, OptTensor dt_bias,
                                                    std::vector<int64_t> directions, bool softplus, int64_t chunk,
                                                    bool save_states) {
    CrossInputs in{u, dt, A, B, C, D, dt_weight, dt_bias, directions, softplus, chunk};
    const CrossSizes s = check_inputs(in);
    const DType dtype = dtype_of(u);
    const CudaContext context(u);
    const Slices slices(s);
    const Tensor y = empty_image_like(u);
    const Tensor states =
        save_states ? empty({slices.states(s)}, ScalarType::Float, u) : empty_absent(ScalarType::Float, u);
    if (s.batch == 0 || s.tokens() == 0) return {y, states};

    for (Tensor* t : {&in.dt, &in.B, &in.C}) *t = canonical_image(*t);
    const char* const why_not = why_not_sm90(s, in, slices, dtype);
    const bool tma = why_not == nullptr;
    if (tma)
        move_by_tma({&in.u}, s, context);
    else
        in.u = canonical_image(in.u);
    const int64_t size = static_cast<int64_t>(u.element_size());
    const Parts parts(y, s.scans, s.dim, tma ? round_up(s.dim, kTmaUnit) : s.dim);
    Tensor carry;
    if (s.states > 1 && !save_states)
        carry = empty({s.batch * s.groups * s.scans, 2, s.states, slices.width}, ScalarType::Float, u);
    ParamHolder param;
    for (int64_t i = 0; i < slices.count(); ++i) {
        const Slice& slice = slices.all[static_cast<size_t>(i)];
        ScanFwdArgs args;
        prepare(args, in, s, slice, slices.saved, param);
        args.y = behind(parts.image(), slice.first, size);
        if (save_states) {
            args.states = static_cast<float*>(states.data_ptr()) + i * slices.states_of_one(s);
        } else if (s.states > 1) {
            args.carry = static_cast<float*>(carry.data_ptr());
        }
        if (tma) {
            note(kOp, " forward: the sm_90 kernel");
            for (int64_t g = 0; g < s.groups; ++g) launch_sm90(args, s, slices, g, dtype, context, u);
            break;  // they take all slices at once
        }
        args.shape.aligned = allows_scan_vectors({args.u, args.y}, slice.dim, size) &&
                             (s.rank > 0 || allows_scan_vectors({args.dt}, slice.dim, size));
        check_cuda(launch_scan_fwd(args, dtype, context.stream(), kOp, why_not), "cross_selective_scan forward");
    }
    parts.add_up(dtype, context);
    return {y, states};
}

// Scans group `g` back by the sm_90 kernel; its sums for the parameters are (batch, parts, slices, K, rows, D).
struct Partials {
    Tensor partials;
    int parts;
};
Partials launch_sm90(const ScanBwdArgs& all, const CrossSizes& s, const Slices& slices, int64_t g, DType dtype,
                     const CudaContext& context, const Tensor& u, const std::vector<int64_t>& slices_apart) {
    constexpr const char* kName = "cross_selective_scan backward";
    const int64_t size = static_cast<int64_t>(u.element_size());
    ScanBwdSm90Args args{};
    args.scan = all;
    take_group(args.scan, s, slices, g, size);
    for (ImageArg* image : {&args.scan.dy, &args.scan.du, &args.scan.ddt, &args.scan.dB, &args.scan.dC})
        *image = of_group(*image, g, size);
    args.scan.ddt.scan = slices_apart[0], args.scan.dB.scan = slices_apart[1], args.scan.dC.scan = slices_apart[2];
    GM_CHECK(prepare_cross_scan_bwd_sm90(dtype, args), kName, ": the driver refused a tensor map of u ",
             show(shape_of(u)));
    check_cuda(share_cross_scan_bwd_sm90(args, dtype), kName);
    const Tensor inter_block_state = inter_block_scratch(args, u);
    const ScanShape& shape = args.scan.shape;
    const int parts = args.plan.blocks_per_plane;
    const int64_t rows = shape.states + kFixedRows + shape.rank;
    const Tensor partials = empty({s.batch, parts, shape.groups, rows, shape.dim}, ScalarType::Float, u);
    args.scan.partials = static_cast<float*>(partials.data_ptr());
    check_cuda(launch_cross_scan_bwd_sm90(args, dtype, context.stream()), kName);
    return {partials, parts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_selective_scan_bwd(
    Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D, OptTensor dt_weight, OptTensor dt_bias,
    Tensor states, std::vector<int64_t> directions, bool softplus, int64_t chunk) {
    CrossInputs in{u, dt, A, B, C, D, dt_weight, dt_bias, directions, softplus, chunk};
    const CrossSizes s = check_inputs(in);
    const Slices slices(s);
    check_image(dy, "dy", shape_of(u), u);
    check_states(states, {slices.states(s)}, u);
    const DType dtype = dtype_of(u);
    const CudaContext context(u);

    const Tensor du = empty_image_like(u);
    const Tensor ddt = empty(shape_of(dt), dt.scalar_type(), u), dB = empty(shape_of(B), B.scalar_type(), u);
    const Tensor dC = empty(shape_of(C), C.scalar_type(), u), dA = empty(shape_of(A), A.scalar_type(), u);
    const Tensor dD = empty_like_or_absent(D, u), ddt_weight = empty_like_or_absent(dt_weight, u);
    const Tensor ddt_bias = empty_like_or_absent(dt_bias, u);
    if (s.batch == 0 || s.tokens() == 0) {
        for (Tensor t : {dA, dD, ddt_weight, ddt_bias}) torch::stable::zero_(t);
        return {du, ddt, dA, dB, dC, dD, ddt_weight, ddt_bias};
    }

    for (Tensor* t : {&in.dt, &in.B, &in.C}) *t = canonical_image(*t);
    const char* const why_not = why_not_sm90(s, in, slices, dtype);
    const bool tma = why_not == nullptr;
    if (tma)
        move_by_tma({&in.u, &dy}, s, context);
    else
        in.u = canonical_image(in.u), dy = canonical_image(dy);
    const int64_t size = static_cast<int64_t>(u.element_size()), all = s.groups * s.scans;
    const int64_t count = slices.count();
    const Parts du_parts(du, s.scans, s.dim, tma ? round_up(s.dim, kTmaUnit) : s.dim);
    const Parts dB_parts(dB, count), dC_parts(dC, count);
    const Parts ddt_parts(ddt, s.rank > 0 ? count : 1);
    Tensor carry;
    if (s.states > 1) carry = empty({s.batch * all, 2, s.states, slices.width}, ScalarType::Float, u);
    ParamHolder param;
    for (int64_t i = 0; i < count; ++i) {
        const Slice& slice = slices.all[static_cast<size_t>(i)];
        ScanBwdArgs args;
        prepare(args, in, s, slice, slices.saved, param);
        args.dy = behind(image_arg(dy), slice.first, size);
        args.du = behind(du_parts.image(), slice.first, size);
        const auto of_slice = [&](const Tensor& t, const Parts& parts) {
            ImageArg image = scans_arg(t);
            image.ptr = parts.data();
            return behind(image, i * parts.stride(), size);
        };
        args.ddt = s.rank > 0 ? of_slice(ddt, ddt_parts) : behind(scans_arg(ddt), slice.first, size);
        args.dB = of_slice(dB, dB_parts), args.dC = of_slice(dC, dC_parts);
        args.states = static_cast<const float*>(states.data_ptr()) + i * slices.states_of_one(s);
        if (s.states > 1) args.carry = static_cast<float*>(carry.data_ptr());
        // Adds up the parameters' gradients of the scans from `first` on, `scans` of them, in `groups` groups: those of
        // the first `dim` channels, then those of the next.
        const auto reduce = [&](const Tensor& partials, int parts, int state_parts, int64_t first, int64_t groups,
                                int64_t scans, int64_t dim) {
            const int64_t channels = first * s.dim + slice.first;
            ScanReduceArgs sums;
            sums.partials = static_cast<const float*>(partials.data_ptr());
            sums.batch = s.batch, sums.parts = parts, sums.state_parts = state_parts;
            sums.groups = static_cast<int>(groups), sums.scans = static_cast<int>(scans);
            sums.dim = static_cast<int>(dim), sums.param_dim = static_cast<int>(s.dim);
            sums.states = args.shape.states, sums.rank = args.shape.rank;
            sums.dA = behind(param_out(dA, A), channels * s.states, size);
            sums.dD = behind(param_out(dD, D), channels, size);
            sums.ddt_bias = behind(param_out(ddt_bias, dt_bias), channels, size);
            sums.ddt_weight = behind(param_out(ddt_weight, dt_weight), channels * s.rank, size);
            check_cuda(launch_scan_reduce(sums, dtype, context.stream()), "cross_selective_scan parameter sums");
        };
        if (tma) {
            note(kOp, " backward: the sm_90 kernel");
            const std::vector<int64_t> apart{ddt_parts.stride(), dB_parts.stride(), dC_parts.stride()};
            for (int64_t g = 0; g < s.groups; ++g) {
                const Partials found = launch_sm90(args, s, slices, g, dtype, context, u, apart);
                reduce(found.partials, found.parts, found.parts, g * s.scans, s.scans * count, s.scans, slices.width);
            }
            break;  // they take all slices at once
        }
        args.shape.aligned = allows_scan_vectors({args.u, args.dy, args.du}, slice.dim, size) &&
                             (s.rank > 0 || allows_scan_vectors({args.dt, args.ddt}, slice.dim, size));
        const ScanBwdKernel kernel(args.shape, static_cast<int>(size), kOp, why_not);
        const int64_t rows = s.states + kFixedRows + s.rank;
        const Tensor partials = empty({s.batch, kernel.parts, all, rows, slice.dim}, ScalarType::Float, u);
        args.partials = static_cast<float*>(partials.data_ptr());
        check_cuda(kernel.launch(args, dtype, context.stream()), "cross_selective_scan backward");
        reduce(partials, kernel.parts, kernel.state_parts, 0, all, all, slice.dim);
    }
    for (const Parts* parts : {&du_parts, &ddt_parts, &dB_parts, &dC_parts}) parts->add_up(dtype, context);
    return {du, ddt, dA, dB, dC, dD, ddt_weight, ddt_bias};
}

}  // namespace
}  // namespace gm

STABLE_TORCH_LIBRARY_IMPL(groupmamba, CUDA, m) {
    m.impl("cross_selective_scan_fwd", TORCH_BOX(&gm::cross_selective_scan_fwd));
    m.impl("cross_selective_scan_bwd", TORCH_BOX(&gm::cross_selective_scan_bwd));
}
