// SPDX-License-Identifier: Apache-2.0
#include "host/explain.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>

namespace gm {
namespace {

struct Notes {
    std::mutex mutex;
    std::string recorded, taken;
    std::set<std::string> printed;
};

Notes& notes() {
    static Notes* const all = new Notes;  // never destroyed: autograd's threads may outlive static objects
    return *all;
}

int initial_mode() {
    const char* const value = std::getenv("GROUPMAMBA_EXPLAIN");
    const bool prints = value != nullptr && *value != '\0' && std::string(value) != "0";
    return prints ? kExplainPrint : kExplainOff;
}

}  // namespace

std::atomic<int>& explain_mode() {
    static std::atomic<int> mode{initial_mode()};
    return mode;
}

void add_note(const std::string& note) {
    Notes& all = notes();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const int mode = explain_mode().load(std::memory_order_relaxed);
    if (mode & kExplainRecord) all.recorded += note + '\n';
    if ((mode & kExplainPrint) && all.printed.insert(note).second)
        std::fprintf(stderr, "groupmamba: %s\n", note.c_str());
}

}  // namespace gm

void groupmamba_explain(int record) {
    gm::Notes& all = gm::notes();
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (record != 0) {
        all.recorded.clear();
        gm::explain_mode() |= gm::kExplainRecord;
    } else {
        gm::explain_mode() &= ~gm::kExplainRecord;
    }
}

const char* groupmamba_explained() {
    gm::Notes& all = gm::notes();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.taken = all.recorded;
    return all.taken.c_str();
}
