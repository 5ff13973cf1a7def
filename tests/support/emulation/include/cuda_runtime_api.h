// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime on the CPU, as far as the emulated kernels and their launchers use it. See ../README.md.
#pragma once

#include <cuda.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

struct Block;
struct Warp;

// A thread of a kernel: a fiber, which runs until it waits.
struct Thread {
    dim3 index;
    unsigned lane;
    Block* block;
    Warp* warp;
    std::vector<std::function<void()>> stores;                   // of TMA, not done yet
    std::deque<std::vector<std::function<void()>>> copies{1};    // of cp.async, in groups, the last of which is open
    std::deque<std::vector<std::function<void()>>> products{1};  // of wgmma, in the same way
    void* stack_pointer;
    void* fiber;  // of ThreadSanitizer
};

struct Barrier {
    unsigned count;
    std::vector<Thread*> waiting = {};
};
struct Warp {
    Barrier barrier{32};
    uint32_t values[32];
    float factors[32][12];  // of a matrix product
};
struct Block {
    Barrier barrier;
    dim3 index;
    std::vector<std::unique_ptr<Warp>> warps;
    unsigned char* shared;
    size_t shared_bytes;
};

// In scheduler.cpp, which no sanitizer looks at.
Thread& self();
const unsigned char* place_in_library();
// Who arrives here waits for all others, and what they wrote before is seen behind it.
void wait(Barrier& barrier);
// Makes the launch one that failed. `fault` is what failed first since `forget_faults`, or null.
void fail(const char* what);
const char* fault();
void forget_faults();
// Runs the threads of a block. False where some wait for others that have ended.
bool run(Block& block, dim3 dim, const std::function<void()>& kernel);
// mbarriers, by their addresses in shared memory: of `arrivals` and bytes that are still to come in a phase.
void init_mbarrier(uint32_t address, int arrivals);
void change_mbarrier(uint32_t address, int arrivals, int64_t bytes);
void wait_mbarrier(uint32_t address, uint32_t parity);

inline void finish_stores() {
    Thread& thread = self();
    for (const auto& store : thread.stores) store();
    thread.stores.clear();
}

// The value of the lane `from` of the warp, or the thread's own where that is outside.
template <class T>
T shuffle(T value, int from) {
    static_assert(sizeof(T) == 4);
    Warp& warp = *self().warp;
    std::memcpy(&warp.values[self().lane], &value, 4);
    wait(warp.barrier);
    T found = value;
    if (from >= 0 && from < 32) std::memcpy(&found, &warp.values[from], 4);
    wait(warp.barrier);
    return found;
}

}  // namespace emulation

#define threadIdx (emulation::self().index)
#define blockIdx (emulation::self().block->index)
inline dim3 blockDim, gridDim;

inline void __syncthreads() { emulation::wait(emulation::self().block->barrier); }
inline void __syncwarp(unsigned = ~0u) { emulation::wait(emulation::self().warp->barrier); }
template <class T>
T __shfl_sync(unsigned, T v, int from, int width = 32) {
    const int lane = static_cast<int>(emulation::self().lane);
    return emulation::shuffle(v, lane / width * width + (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int bits) {
    return emulation::shuffle(v, static_cast<int>(emulation::self().lane) ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned, T v, int by, int width = 32) {
    const int lane = static_cast<int>(emulation::self().lane);
    return emulation::shuffle(v, lane % width >= by ? lane - by : -1);
}
template <class T>
T __shfl_down_sync(unsigned, T v, int by, int width = 32) {
    const int lane = static_cast<int>(emulation::self().lane);
    return emulation::shuffle(v, lane % width + by < width ? lane + by : -1);
}

// Of a `__shared__` variable, which is in the library: 32 bits are enough from one place there.
inline uint32_t __cvta_generic_to_shared(const void* p) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulation::place_in_library());
}
// In place of the instruction ld.shared.
template <class... T>
void load_shared(uint32_t address, T&... out) {
    const unsigned char* from = emulation::place_in_library() + static_cast<int32_t>(address);
    ((std::memcpy(&out, from, sizeof(T)), from += sizeof(T)), ...);
}

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return static_cast<unsigned>(((uint64_t{high} << 32) | low) >> (by & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return static_cast<unsigned>((((uint64_t{high} << 32) | low) << (by & 31)) >> 32);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = uint64_t{high} << 32 | low;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __fmul_rn(float a, float b) {
    volatile float product = a * b;  // not part of a fused multiply-add
    return product;
}
inline float __uint_as_float(unsigned bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
inline unsigned __float_as_uint(float v) {
    unsigned bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
    return a < b ? a : b;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
    return a > b ? a : b;
}

// Host ------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidValue,
    cudaErrorInvalidConfiguration,
    cudaErrorLaunchTimeout,
    cudaErrorIllegalInstruction,
};
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorLaunchTimeout: return "threads wait for ever";
        case cudaErrorIllegalInstruction: return emulation::fault();
        default: return "not launched";
    }
}
namespace emulation {
inline const char* problem_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }
}  // namespace emulation
enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrCooperativeLaunch,
    cudaDevAttrL2CacheSize,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed, cooperative;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
    int ptxVersion;
};

// A GPU of compute capability 9.0 with one multiprocessor, and without cooperative launches: blocks run one by one.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrMultiProcessorCount: *value = 1; break;
        case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
        default: *value = 0;
    }
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    return *attributes = {0, 90}, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
    return *blocks = 2, cudaSuccess;
}
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, unsigned,
                                                    cudaDriverEntryPointQueryResult* result) {
    *entry = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);  // the only one that is asked for
    return *result = cudaDriverEntryPointSuccess, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    return std::memset(p, value, bytes), cudaSuccess;
}

template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args&&... args) {
    blockDim = config->blockDim, gridDim = config->gridDim;
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    std::vector<uint4> memory(config->dynamicSmemBytes / sizeof(uint4) + 16);
    auto* const shared =
        reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 127) / 128 * 128);
    bool complete = true;
    emulation::forget_faults();
    for (unsigned number = 0; number < gridDim.x * gridDim.y * gridDim.z; ++number) {
        std::memset(memory.data(), 0xff, memory.size() * sizeof(uint4));
        emulation::Block block{{threads}, dim3(), {}, shared, config->dynamicSmemBytes};
        block.index = {number % gridDim.x, number / gridDim.x % gridDim.y, number / (gridDim.x * gridDim.y)};
        for (unsigned first = 0; first < threads; first += 32) {
            block.warps.push_back(std::make_unique<emulation::Warp>());
            block.warps.back()->barrier.count = threads - first < 32 ? threads - first : 32;
        }
        complete = emulation::run(block, blockDim, [&] { kernel(args...), emulation::finish_stores(); }) && complete;
    }
    if (emulation::fault() != nullptr) return cudaErrorIllegalInstruction;
    return complete ? cudaSuccess : cudaErrorLaunchTimeout;
}
