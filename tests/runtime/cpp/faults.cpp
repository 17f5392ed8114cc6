// Devices that fail, hang, give wrong numbers or have too little memory: the pixels stay the same, or there is one error.
//   faults BUNDLE
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "restorer.hpp"

using namespace tw;

namespace {

int compared = 0, wrong = 0;

void expect(const std::string& what, bool fine, const std::string& told) {
    ++compared;
    wrong += !fine;
    std::printf("%s%s: %s\n", fine ? "" : "WRONG ", what.c_str(), told.c_str());
}

// A device before another one. `fault` may throw, wait, or change the results.
using Results = Named<Tensor>;
struct Call {
    std::string device;
    const Named<Tensor>& inputs;
    int number;  // of all calls of this device
    const std::atomic<bool>& stopped;
};
using Fault = std::function<void(const Call&, Results*)>;  // before the call without results, and after it

class Changed : public Device {
   public:
    Changed(std::shared_ptr<Device> device, Fault fault) : device_(std::move(device)), fault_(std::move(fault)) {}

    const std::string& name() const override { return device_->name(); }
    Results run(const std::string& component, const Named<Tensor>& inputs, const Strings& outputs) override {
        Call call{name(), inputs, ++calls_, stopped_};
        fault_(call, nullptr);
        Results results = device_->run(component, inputs, outputs);
        fault_(call, &results);
        return results;
    }
    void stop() override {
        stopped_ = true;
        device_->stop();
    }
    void close(const std::set<std::string>& components) override { device_->close(components); }

   private:
    std::shared_ptr<Device> device_;
    Fault fault_;
    std::atomic<int> calls_{0};
    std::atomic<bool> stopped_{false};
};

std::string bundle;

Restorer restorer(const std::string& devices, Fault fault = {}, std::int64_t batch = 1, double deadline_s = 0) {
    OpenOptions options;
    options.devices = devices;
    options.engines.threads = 1;
    options.batch = batch;
    options.deadline_s = deadline_s;
    if (fault) options.changed = [fault](std::shared_ptr<Device> device) { return std::make_shared<Changed>(std::move(device), fault); };
    return Restorer(bundle, options);
}

Picture picture() {
    Picture picture{{40, 70, 3, {}}, std::nullopt, false};
    std::uint32_t state = 1;
    for (int i = 0; i < 40 * 70 * 3; ++i) state = state * 1664525 + 1013904223, picture.rgb.bytes.push_back(static_cast<std::uint8_t>(state >> 24));
    return picture;
}

RestoreOptions options_with(std::int64_t tile) {
    RestoreOptions options;
    options.seed = 7;
    options.tile = tile;
    options.overlap = tile / 4;
    return options;
}

constexpr std::int64_t TILE = 64;

struct Told {
    Pixels rgb;
    std::string notes, error;
    int code = 0;
};

Told restored(Restorer& restorer, std::int64_t tile = TILE, Watch watch = {}) {
    Told told;
    watch.on_note = [&](const std::string& note) { told.notes += note + "; "; };
    try {
        told.rgb = restorer.restore(picture(), options_with(tile), watch);
    } catch (const Error& error) {
        told.error = error.what();
        told.code = error.code;
    }
    return told;
}

void expect_pixels(const std::string& what, const Told& told, const Pixels& right, const std::string& note) {
    bool same = told.rgb.bytes == right.bytes && !right.bytes.empty();
    bool noted = note.empty() ? told.notes.empty() : told.notes.find(note) != std::string::npos;
    expect(what, same && noted && told.error.empty(), (same ? "same pixels; " : "other pixels; ") + told.notes + told.error);
}

void expect_error(const std::string& what, const Told& told, int code, const std::string& part) {
    expect(what, told.code == code && told.error.find(part) != std::string::npos && told.error.find('\n') == std::string::npos, told.error);
}

// One device waits here until another one has got a call, as either might run all tiles alone.
class Gate {
   public:
    void open() { open_ = true; }
    void pass() const {
        while (!open_) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }

   private:
    std::atomic<bool> open_{false};
};

void fail_on(const std::string& device, const Call& call, const Results* results) {
    if (!results && call.device == device) throw std::runtime_error("it is broken");
}

std::int64_t rows_of(const Call& call) {
    std::int64_t rows = 1;
    for (const auto& [name, tensor] : call.inputs) rows = std::max(rows, tensor.shape.empty() ? 1 : tensor.shape[0]);
    return rows;
}

void devices_that_fail(const Pixels& right) {
    Gate failed;
    Fault first_fails = [&](const Call& call, const Results* results) {
        if (call.device == "cpu:0") failed.open();
        failed.pass();
        fail_on("cpu:0", call, results);
    };
    Restorer one_fails = restorer("cpu:0,cpu:1", first_fails);
    expect_pixels("a device fails", restored(one_fails), right, "cpu:0 failed (it is broken); its tiles run elsewhere");
    expect_pixels("it is not used again", restored(one_fails), right, "");
    Restorer alone = restorer("cpu:0", first_fails);
    expect_error("the only device fails", restored(alone), TW_ERROR, "it is broken");
    expect_error("it is tried again for another image", restored(alone), TW_ERROR, "it is broken");
    Restorer both_fail = restorer("cpu:0,cpu:1", [](const Call& call, const Results* results) { fail_on(call.device, call, results); });
    expect_error("both devices fail", restored(both_fail), TW_ERROR, "it is broken");
    Restorer late = restorer("cpu:0,cpu:1", [](const Call& call, const Results* results) {
        if (!results && call.device == "cpu:1" && call.number > 2) throw Error(damaged, "it broke later");
    });
    Told told = restored(late);
    expect_pixels("a device may fail later", told, right, told.notes.empty() ? "" : "cpu:1 failed (it broke later)");
}

void results_that_are_wrong(const Pixels& right) {
    Gate given;
    Restorer not_finite = restorer("cpu:0,cpu:1", [&](const Call& call, Results* results) {
        if (call.device == "cpu:1") given.open();
        given.pass();
        if (results && call.device == "cpu:1") for (auto& [name, tensor] : *results) tensor = tensor_of(Floats(tensor.count(), NAN), tensor.shape);
    });
    expect_pixels("a device gives NaN", restored(not_finite), right, "numbers are not finite");
    Restorer all_wrong = restorer("cpu:0", [](const Call&, Results* results) {
        if (!results) return;
        for (auto& [name, tensor] : *results) tensor = tensor_of(Floats(tensor.count(), INFINITY), tensor.shape);
    });
    expect_error("the only device gives infinity", restored(all_wrong), TW_ACCURACY, "holds inf");
    Restorer shapes = restorer("cpu:0", [](const Call&, Results* results) {
        if (!results) return;
        for (auto& [name, tensor] : *results) tensor = tensor_of(Floats(6, 0), {1, 1, 2, 3});
    });
    expect_error("a device gives another shape", restored(shapes), TW_BUNDLE, "has shape [1, 1, 2, 3]");
}

// What a device that hangs reads. Its thread may outlive the test.
struct Hang {
    Gate begun;
    std::mutex lock;
    std::condition_variable released;
    bool goes_on = false;
    int waiting = 0;
};

void devices_that_hang(const Pixels& right) {
    auto state = std::make_shared<Hang>();
    Fault hang = [state](const Call& call, const Results* results) {
        if (!results && call.device == "cpu:0") state->begun.open();
        state->begun.pass();
        if (results || call.device != "cpu:0") return;
        std::unique_lock guard(state->lock);
        ++state->waiting;
        state->released.wait(guard, [&] { return state->goes_on; });
        --state->waiting;
        state->released.notify_all();
    };
    {
        Restorer hangs = restorer("cpu:0,cpu:1", hang, 1, 4.0);
        expect_pixels("a device hangs", restored(hangs), right, "cpu:0 hangs in");
        expect_pixels("it is not used again", restored(hangs), right, "");
        Restorer alone = restorer("cpu:0", hang, 1, 0.2);
        expect_error("the only device hangs", restored(alone), TW_DEVICE, "has not ended after");
        expect_error("no device answers", restored(alone), TW_DEVICE, "no device answers");
    }
    std::unique_lock guard(state->lock);  // their calls end after the restorers
    state->goes_on = true;
    state->released.notify_all();
    state->released.wait(guard, [&] { return state->waiting == 0; });
}

void too_little_memory(const Pixels& right) {
    Restorer batches = restorer("cpu:0", [](const Call& call, const Results* results) {
        if (!results && rows_of(call) > 2) throw Error(resource, "failed to allocate");
    }, 4);
    Told told = restored(batches);
    expect_pixels("a batch is too large", told, right, "too little memory for 4 tiles at once; it takes 2 now");
    expect_pixels("no larger batch is tried", restored(batches), right, "");
    std::int64_t most = TILE * TILE / 2;
    Restorer tiles = restorer("cpu:0", [most](const Call& call, const Results* results) {
        for (const auto& [name, tensor] : call.inputs)
            if (!results && tensor.shape.size() == 4 && tensor.shape[1] == 3 && tensor.shape[2] * tensor.shape[3] > most) throw std::bad_alloc();
    });
    Restorer plain = restorer("cpu:0");
    RestoreOptions smaller = options_with(TILE);
    smaller.tile = TILE / 2;
    expect_pixels("a tile is too large", restored(tiles), plain.restore(picture(), smaller, {}), "the image began anew with --tile 32");
    Restorer none = restorer("cpu:0", [](const Call&, const Results*) { throw std::bad_alloc(); });
    expect_error("no tile is small enough", restored(none), TW_RESOURCE, "too little memory");
}

void callbacks(const Pixels& right) {
    std::atomic<bool> waits{true}, begun{false};
    Restorer slow = restorer("cpu:0,cpu:1", [&](const Call& call, const Results* results) {
        if (results || !waits || call.number != 2) return;
        begun = true;
        while (!call.stopped) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        throw std::runtime_error("was stopped");
    });
    Watch watch;
    watch.is_cancelled = [&] { return begun.load(); };
    expect_error("a call is cancelled while it runs", restored(slow, TILE, watch), TW_CANCELLED, "cancelled");
    waits = false;
    Watch throws;
    throws.on_progress = [](const std::string&, std::int64_t, std::int64_t) { throw Error(usage, "the callback is wrong"); };
    expect_error("a callback throws", restored(slow, TILE, throws), TW_USAGE, "the callback is wrong");
    std::map<std::string, std::int64_t> last, totals;
    std::size_t covered = 0;
    bool rises = true, same = true;
    Watch counts;
    counts.on_progress = [&](const std::string& pass, std::int64_t done, std::int64_t total) {
        rises = rises && done > last[pass];
        last[pass] = done, totals[pass] = total;
    };
    counts.on_part = [&](const Pixels& rgb, const Tile& part) {
        covered += static_cast<std::size_t>(part.height * part.width);
        for (std::int64_t y = part.top; y < part.top + part.height; ++y)
            same = same && !std::memcmp(&rgb.bytes[3 * (y * rgb.width + part.left)], &right.bytes[3 * (y * rgb.width + part.left)], 3 * part.width);
    };
    expect_pixels("it works after both", restored(slow, TILE, counts), right, "");
    expect("progress rises to the total", rises && last == totals && !last.empty(), std::to_string(last.size()) + " passes");
    expect("each part is final, and comes once", same && covered == right.bytes.size() / 3, std::to_string(covered) + " pixels");
}

// A process that was suspended in a call goes on where it was.
void suspended(const Pixels& right) {
    std::atomic<bool> first{true};
    auto fault = [&](const Call&, Results* results) {
        if (results || !first.exchange(false)) return;
        const std::string process = std::to_string(getpid());
        const std::string command = "(kill -STOP " + process + "; sleep 4; kill -CONT " + process + ") &";
        if (std::system(command.c_str())) throw std::runtime_error("no shell");
        std::this_thread::sleep_for(std::chrono::milliseconds(500));
    };
    Restorer one = restorer("cpu:0", fault, 1, 2.0);
    expect_pixels("suspended in a call", restored(one), right, "");
}

}  // namespace

int main(int count, char** words) {
    if (count != 2) return std::fputs("usage: faults BUNDLE\n", stderr), 2;
    bundle = words[1];
    Restorer plain = restorer("cpu:0");
    Pixels right = restored(plain).rgb;
    for (int i = 0; i < 3; ++i) {
        Restorer both = restorer("cpu:0,cpu:1");
        expect_pixels("two devices", restored(both), right, "");
    }
    devices_that_fail(right);
    results_that_are_wrong(right);
    devices_that_hang(right);
    too_little_memory(right);
    callbacks(right);
    suspended(right);
    std::printf("%d cases, %d wrong\n", compared, wrong);
    return wrong ? 1 : 0;
}
