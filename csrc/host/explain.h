// SPDX-License-Identifier: Apache-2.0
// Notes of which kernel an op took and why not a faster one, for those who ask: groupmamba_ext.explain, or the
// environment variable GROUPMAMBA_EXPLAIN=1, with which each different note is printed to stderr once.
#pragma once

#include <atomic>
#include <string>

#include "host/tensor.h"

namespace gm {

enum ExplainMode : int { kExplainOff = 0, kExplainRecord = 1, kExplainPrint = 2 };  // bits
std::atomic<int>& explain_mode();
void add_note(const std::string& note);

inline bool explains() { return explain_mode().load(std::memory_order_relaxed) != kExplainOff; }

// The parts of a note are put together only where somebody asks.
template <class... Parts>
void note(const Parts&... parts) {
    if (explains()) add_note(message(parts...));
}

}  // namespace gm

// For Python, by ctypes. Records notes from here on, of all threads, or no longer.
extern "C" __attribute__((visibility("default"))) void groupmamba_explain(int record);
// The notes recorded so far, a line each; valid until the next call of either function.
extern "C" __attribute__((visibility("default"))) const char* groupmamba_explained();
