// SPDX-License-Identifier: Apache-2.0
// Work of an op beside its other work.
#pragma once

#include <utility>
#include <vector>

#include "host/stream.h"

namespace gm {

// A second stream from here to join(), for kernels of a few microseconds that the next kernels of the first stream
// need not wait for. Only while a CUDA graph is captured, where it costs nothing: in eager calls the events would take
// the host longer than such kernels take the GPU, and everything stays on the first stream. What the branch reads or
// writes must live until join(): memory freed before that may be used again by the first stream.
class Branch {
public:
    explicit Branch(const CudaContext& context) : main_(context.stream()), stream_(main_) {
        cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
        unsigned long long id = 0;
        check_cuda(cudaStreamGetCaptureInfo(main_, &status, &id), "asking for a capture");
        if (status != cudaStreamCaptureStatusActive) return;
        const Side& side = side_of_thread();
        // A stream stays in the capture that it joined until that ends; a graph captured within another has a capture
        // of its own.
        cudaStreamCaptureStatus side_status = cudaStreamCaptureStatusNone;
        unsigned long long side_id = 0;
        check_cuda(cudaStreamGetCaptureInfo(side.stream, &side_status, &side_id), "asking for a capture");
        if (side_status != cudaStreamCaptureStatusNone && (side_status != status || side_id != id)) return;
        check_cuda(cudaEventRecord(side.event, main_), "a branch of the graph");
        check_cuda(cudaStreamWaitEvent(side.stream, side.event, 0), "a branch of the graph");
        stream_ = side.stream, event_ = side.event;
    }
    Branch(const Branch&) = delete;
    Branch& operator=(const Branch&) = delete;
    // An open branch would invalidate the capture, and an error from here would hide the one that unwinds.
    ~Branch() {
        if (stream_ != main_) close();
    }

    cudaStream_t stream() const { return stream_; }
    void join() {
        if (stream_ == main_) return;
        const cudaError_t error = close();
        check_cuda(error, "the end of a branch of the graph");
    }

private:
    struct Side {
        int device;
        cudaStream_t stream;
        cudaEvent_t event;
    };

    // One for each thread and device, never freed: a thread that captures once will do so again.
    static const Side& side_of_thread() {
        thread_local std::vector<Side> sides;
        int device = 0;
        check_cuda(cudaGetDevice(&device), "the device");
        for (const Side& side : sides)
            if (side.device == device) return side;
        Side side{device, nullptr, nullptr};
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
        check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "the capture's mode");
        cudaError_t error = cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking);
        if (error == cudaSuccess) error = cudaEventCreateWithFlags(&side.event, cudaEventDisableTiming);
        check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "the capture's mode");
        check_cuda(error, "a stream for a branch of the graph");
        sides.push_back(side);
        return sides.back();
    }

    cudaError_t close() {
        const cudaStream_t side = std::exchange(stream_, main_);
        const cudaError_t error = cudaEventRecord(event_, side);
        return error == cudaSuccess ? cudaStreamWaitEvent(main_, event_, 0) : error;
    }

    cudaStream_t main_, stream_;
    cudaEvent_t event_ = nullptr;
};

}  // namespace gm
