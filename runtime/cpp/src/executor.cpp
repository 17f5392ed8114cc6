#include "executor.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <list>
#include <system_error>

namespace tw {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr double FIRST_DEADLINE_S = 3600, LEAST_DEADLINE_S = 60, SLOWER = 20;
constexpr double LOOK_S = 1;    // between two looks at running calls
constexpr Seconds ASK_S{0.05};  // between two questions whether the job is cancelled, and between two stops of a call

// Nobody waits for the outputs of the call any more.
struct Unwanted {};

struct Fault {
    Error error;
    std::string component;
};

Clock::time_point after(Clock::time_point time, double seconds) { return time + std::chrono::duration_cast<Clock::duration>(Seconds(seconds)); }

}  // namespace

// One run: its threads may outlive it only inside of a call that hangs.
class Round : public std::enable_shared_from_this<Round> {
   public:
    Round(Executor& executor, const Task& task)
        : executor_(executor), task_(task), graph_(*task.graph), devices_(executor.devices_), queue_(graph_, task.runs, executor.state_, executor.pass_by_pass_),
          running_(devices_.size()), free_(devices_.size()) {
        for (std::size_t place = 0; place < graph_.tile_blocks.size(); ++place)
            for (auto number : graph_.tile_blocks[place]) totals_[place] += graph_.blocks[number].size;
        executor_.state_.retired.insert(executor_.hung_.begin(), executor_.hung_.end());
    }

    void run() {
        begin();
        std::unique_lock lock(lock_);
        auto ask = Clock::now();
        const double shortest = executor_.deadline_s_ > 0 ? std::min(executor_.deadline_s_, LOOK_S) : LOOK_S;
        while (true) {
            while (!events_.empty() && !error_) {
                auto event = std::move(events_.front());
                events_.pop_front();
                outside(lock, event);
            }
            if (stopped_) break;
            auto now = Clock::now(), wake = Clock::time_point::max();
            for (std::size_t device = 0; device < devices_.size(); ++device) {
                auto& running = running_[device];
                if (!running) continue;
                // a thread that was late to look was suspended with the whole process, which does not count
                double late = Seconds(now - running->looked).count() - shortest;
                running->looked = now;
                if (late > LOOK_S) running->ends = after(running->ends, late);
                if (running->ends <= now) hangs(device, *running);
                if (running) wake = std::min(wake, running->ends);
            }
            // a call that begins meanwhile ends no sooner than after the shortest deadline
            wake = std::min(wake, after(now, shortest));
            if (task_.is_cancelled && now >= ask) {
                outside(lock, [this] {
                    if (task_.is_cancelled()) throw Error(cancelled, "cancelled");
                });
                ask = after(Clock::now(), ASK_S.count());
            }
            if (task_.is_cancelled) wake = std::min(wake, ask);
            if (events_.empty() && !stopped_) told_.wait_until(lock, wake);
        }
        end_threads(lock);
        if (error_) std::rethrow_exception(error_);
    }

   private:
    struct Flight {
        Batch batch;
        bool lost = false;    // other devices have its nodes now, because its own hung
        bool landed = false;  // its calls have ended well
    };
    struct Running {
        Flight* flight;
        std::string component;
        Clock::time_point start, ends, looked;  // when it began, when it hangs, and when it began or was last looked at
    };

    Executor& executor_;
    const Task& task_;
    const Graph& graph_;
    std::vector<std::shared_ptr<Device>> devices_;  // a call that hangs keeps its device

    std::mutex lock_;  // of what follows
    std::condition_variable changed_, told_;
    Queue queue_;
    std::list<Flight> flying_;
    std::vector<std::optional<Running>> running_;  // device -> the call that it runs
    std::deque<std::condition_variable> free_;     // the call that a device ran has ended
    std::deque<std::function<void()>> events_;     // for the thread that called `run`
    std::map<Node, std::set<std::size_t>> suspects_;  // node of a call that failed -> devices that it failed on
    std::set<std::size_t> retired_here_;
    std::map<std::size_t, std::int64_t> totals_, counts_;  // pass -> nodes, and those that are done
    std::exception_ptr error_;
    bool stopped_ = false;
    std::size_t left_ = 0, hanging_ = 0;  // threads that have not ended; those of them that are in a call that hangs
    std::vector<std::thread> threads_;
    std::vector<char> ended_;

    void begin() {
        std::int64_t nodes = 0;
        for (const auto& block : graph_.blocks) nodes += task_.runs[block.number] ? block.size : 0;
        if (executor_.hung_.size() == devices_.size()) throw Error(device, names() + ": no device answers; open the bundle anew");
        if (task_.is_cancelled && task_.is_cancelled()) throw Error(cancelled, "cancelled");
        std::lock_guard guard(lock_);
        stopped_ = queue_.done();
        for (std::size_t lane = 0; lane < LANES; ++lane)
            for (std::size_t device = 0; device < devices_.size() && static_cast<std::int64_t>(threads_.size()) < nodes; ++device) {
                std::size_t number = threads_.size();
                try {
                    threads_.emplace_back([self = shared_from_this(), device, number] { self->serve(device, number); });
                } catch (const std::system_error&) {  // no more threads: those that there are do the work
                    if (threads_.empty()) throw Error(resource, "the system starts no further thread; end other processes");
                    return;
                }
                ended_.push_back(0);
                ++left_;
            }
    }

    std::string names() const {
        Strings all;
        for (const auto& device : devices_) all.push_back(device->name());
        return join(all);
    }

    // Calls a function of the caller without the lock. What it throws ends the run.
    void outside(std::unique_lock<std::mutex>& lock, const std::function<void()>& function) {
        lock.unlock();
        std::exception_ptr error;
        try {
            function();
        } catch (...) {
            error = std::current_exception();
        }
        lock.lock();
        if (error) stop(error);
    }

    // ---- threads of devices

    void serve(std::size_t device, std::size_t number) {
        std::unique_lock lock(lock_);
        while (true) {
            std::optional<Batch> batch;
            while (!stopped_ && !(batch = queue_.take(device))) changed_.wait(lock);
            if (stopped_) break;
            auto flight = flying_.insert(flying_.end(), Flight{std::move(*batch)});
            lock.unlock();
            run_batch(*flight);
            lock.lock();
            bool lost = flight->lost;
            flying_.erase(flight);
            if (lost) break;
        }
        ended_[number] = 1;
        --left_;
        told_.notify_all();
    }

    void run_batch(Flight& flight) {
        try {
            std::vector<Outputs> outputs = outputs_of(flight);
            commit(flight, outputs);
        } catch (const Unwanted&) {
        } catch (const Fault& fault) {
            device_failed(flight, fault);
        } catch (const std::bad_alloc&) {
            std::lock_guard guard(lock_);
            if (!flight.lost) stop(std::make_exception_ptr(LacksMemory(resource, "too little memory; use smaller tiles or low_memory")));
        } catch (...) {  // the job is at fault: another device would fail too
            std::lock_guard guard(lock_);
            if (!flight.lost) stop(std::current_exception());
        }
    }

    std::vector<Outputs> outputs_of(Flight& flight) {
        const Batch& batch = flight.batch;
        const Values& values = *task_.values;
        std::vector<Outputs> outputs;
        for (const auto& node : batch.nodes) outputs.push_back({{}, values.begun(graph_.blocks[node.block], node.tile)});
        const Block& first = graph_.blocks[batch.nodes[0].block];
        for (const Call* call : first.calls) {
            Named<Tensor> inputs;
            for (const auto& [name, source] : call->inputs) inputs[name] = input(batch, source, outputs);
            Named<Tensor> results = call_device(flight, *call, inputs);
            try {
                check_results(graph_, first, *call, executor_.signatures_.at(call->run), inputs, results, static_cast<std::int64_t>(batch.nodes.size()));
            } catch (const Error& error) {
                throw Fault{error, call->run};
            }
            for (const auto& [name, target] : call->outputs)
                for (std::size_t i = 0; i < batch.nodes.size(); ++i) {
                    const Tensor& all = results.at(name);
                    Tensor row = batch.nodes.size() == 1 ? all : row_of(all, i);
                    const Block& block = graph_.blocks[batch.nodes[i].block];
                    if (graph_.program->grids.count(target)) {
                        outputs[i].parts[target] = values.weighted(block, target, batch.nodes[i].tile, row);
                    } else {
                        outputs[i].values[target] = row;
                    }
                }
        }
        return outputs;
    }

    // An input of a call: a row for each node, or one that all nodes share.
    Tensor input(const Batch& batch, const std::string& source, const std::vector<Outputs>& outputs) const {
        std::vector<Tensor> rows;
        bool of_tile = false, same = true;
        for (std::size_t i = 0; i < (source[0] == '#' ? 1 : batch.nodes.size()); ++i) {
            const Node& node = batch.nodes[i];
            Fed fed = task_.values->feed(graph_.blocks[node.block], node.tile, source, outputs[i]);
            of_tile = of_tile || fed.of_tile;
            same = same && (rows.empty() || fed.value.same(rows[0]));
            rows.push_back(std::move(fed.value));
        }
        return rows.size() > 1 && (of_tile || !same) ? concatenated(rows) : rows[0];
    }

    // Runs a network as soon as the device is free.
    Named<Tensor> call_device(Flight& flight, const Call& call, const Named<Tensor>& inputs) {
        std::size_t number = flight.batch.device;
        std::shared_ptr<Device> device = devices_[number];  // what a call that hangs still uses is its own
        const std::string component = call.run;
        const Strings outputs = keys(call.outputs);
        const Block& block = graph_.blocks[flight.batch.nodes[0].block];
        Executor::Kind kind{component, block.plan.tile_height, block.plan.tile_width, flight.batch.nodes.size()};
        auto start = Clock::now();
        {
            std::unique_lock lock(lock_);
            while (running_[number] && !flight.lost && !stopped_) free_[number].wait(lock);
            if (stopped_ || flight.lost) throw Unwanted();
            start = Clock::now();
            running_[number] = Running{&flight, component, start, after(start, deadline(kind)), start};
        }
        Named<Tensor> results;
        std::optional<Fault> fault;
        try {
            results = device->run(component, inputs, outputs);
        } catch (const Error& error) {
            fault = Fault{error, component};
        } catch (const std::bad_alloc&) {
            fault = Fault{Error(resource, component + ": too little memory; use smaller tiles or low_memory"), component};
        } catch (const std::exception& error) {
            fault = Fault{Error(internal, one_line(error.what())), component};
        } catch (...) {
            fault = Fault{Error(internal, component + " failed"), component};
        }
        std::lock_guard guard(lock_);
        if (flight.lost) {
            --hanging_;
            throw Unwanted();
        }
        running_[number].reset();
        free_[number].notify_one();
        if (stopped_) throw Unwanted();
        double& slowest = executor_.slowest_[kind];
        slowest = std::max(slowest, Seconds(Clock::now() - start).count());
        if (fault) throw Fault(*fault);
        return results;
    }

    double deadline(const Executor::Kind& kind) const {
        if (executor_.deadline_s_ > 0) return executor_.deadline_s_;
        auto slowest = executor_.slowest_.find(kind);
        return slowest == executor_.slowest_.end() ? FIRST_DEADLINE_S : std::max(LEAST_DEADLINE_S, SLOWER * slowest->second);
    }

    // Stores the outputs, hands on what is final, and lets the nodes run that waited.
    void commit(Flight& flight, const std::vector<Outputs>& outputs) {
        const Batch& batch = flight.batch;
        Values& values = *task_.values;
        {
            std::lock_guard guard(lock_);
            if (stopped_ || flight.lost) return;
            flight.landed = true;
        }
        std::vector<std::function<void()>> events;
        for (std::size_t i = 0; i < batch.nodes.size(); ++i)
            for (auto region : values.commit(graph_.blocks[batch.nodes[i].block], batch.nodes[i].tile, outputs[i])) {
                Tile place = values.place_of(region);
                if (task_.on_final) task_.on_final(place, values.region(region).floats());
                values.handed_on(region);
                if (task_.on_part) events.push_back([this, place] { task_.on_part(place); });
            }
        const Block& block = graph_.blocks[batch.nodes[0].block];
        std::lock_guard guard(lock_);
        if (stopped_) return;
        auto place = static_cast<std::size_t>(block.place);
        if (block.section != "shared" && task_.on_progress) {
            std::int64_t done = counts_[place] += static_cast<std::int64_t>(batch.nodes.size()), total = totals_[place];
            events.push_back([this, place, done, total] { task_.on_progress(graph_.program->passes[place].name, done, total); });
        }
        for (auto& event : events) events_.push_back(std::move(event));
        for (const auto& node : batch.nodes) suspects_.erase(node);
        queue_.complete(batch);
        if (executor_.pass_by_pass_ && queue_.pass_done(block.place)) close_engines(block.place);
        stopped_ = queue_.done();
        changed_.notify_all();
        told_.notify_all();
    }

    // Gives back the memory of the engines that no pass that is left needs.
    void close_engines(std::int64_t place) {
        std::set<std::string> components;
        for (const auto& placed : graph_.program->passes[place].calls()) components.insert(placed.call->run);
        for (const auto& block : graph_.blocks)
            if (queue_.left(block.number))
                for (const Call* call : block.calls) components.erase(call->run);
        for (const auto& device : devices_) device->close(components);
    }

    // ---- faults

    // Retires a device and runs its nodes elsewhere; a node that fails on two devices is itself at fault. A device with too
    // little memory for a batch stays, and takes half as many nodes from then on.
    void device_failed(const Flight& flight, const Fault& fault) {
        const Batch& batch = flight.batch;
        const std::string& name = devices_[batch.device]->name();
        bool lacks_memory = fault.error.code == resource;
        auto count = static_cast<std::int64_t>(batch.nodes.size());
        std::lock_guard guard(lock_);
        if (flight.lost || stopped_) return;
        queue_.put_back(batch);
        changed_.notify_all();
        auto& retired = executor_.state_.retired;
        if (lacks_memory && count > 1) {
            std::int64_t& most = executor_.state_.most.try_emplace({batch.device, fault.component}, count).first->second;
            most = std::min(count / 2, most);
            note(name + " has too little memory for " + std::to_string(count) + " tiles at once; it takes " + std::to_string(most) + " now");
        } else if (!retired.count(batch.device)) {  // else the other thread of the device has retired it
            if (failed_elsewhere(batch) || retired.size() == devices_.size() - 1) {
                auto error = lacks_memory ? std::make_exception_ptr(LacksMemory(fault.error.code, fault.error.what())) : std::make_exception_ptr(fault.error);
                give_up(error);
                return;
            }
            retired.insert(batch.device);
            retired_here_.insert(batch.device);
            note(name + " failed (" + one_line(fault.error.what()) + "); its tiles run elsewhere");
        }
    }

    // Ends the run. Devices that failed at its nodes are used again, for other runs.
    void give_up(const std::exception_ptr& error) {
        for (auto device : retired_here_)
            if (!executor_.hung_.count(device)) executor_.state_.retired.erase(device);
        stop(error);
    }

    // Retires a device for good, and gives its nodes to others.
    void hangs(std::size_t device, const Running& running) {
        double spent = Seconds(Clock::now() - running.start).count();
        char seconds[32];
        std::snprintf(seconds, sizeof seconds, "%.0f", spent);
        const std::string& name = devices_[device]->name();
        auto error = std::make_exception_ptr(Error(Code::device, name + ": " + running.component + " has not ended after " + seconds +
                                                                     " s; if the call is only slow, allow it more time with deadline_s"));
        bool elsewhere = failed_elsewhere(running.flight->batch);
        note(name + " hangs in " + running.component + "; its tiles run elsewhere");
        executor_.hung_.insert(device);
        executor_.state_.retired.insert(device);
        for (auto& flight : flying_) {
            if (flight.batch.device != device || flight.lost || flight.landed) continue;
            flight.lost = true;
            queue_.put_back(flight.batch);
        }
        running_[device].reset();
        ++hanging_;
        devices_[device]->stop();
        free_[device].notify_all();
        if (executor_.hung_.size() == devices_.size()) {
            stop(error);
        } else if (elsewhere) {
            give_up(error);
        } else if (executor_.state_.retired.size() == devices_.size()) {
            executor_.state_.retired = executor_.hung_;  // the others have only failed: they are tried again
        }
        changed_.notify_all();
    }

    // Remembers that these nodes failed on this device; whether one of them has failed on another, too.
    bool failed_elsewhere(const Batch& batch) {
        bool elsewhere = false;
        for (const auto& node : batch.nodes) {
            auto& failed_on = suspects_[node];
            failed_on.insert(batch.device);
            elsewhere = elsewhere || failed_on.size() > 1;
        }
        return elsewhere;
    }

    void note(const std::string& text) {
        if (task_.on_note) events_.push_back([this, text] { task_.on_note(text); });
        told_.notify_all();
    }

    // ---- the end

    void stop(const std::exception_ptr& error) {
        if (!error_) error_ = error;
        stopped_ = true;
        for (auto& free : free_) free.notify_all();
        changed_.notify_all();
        told_.notify_all();
    }

    // Waits for all threads but those that hang. A call may miss the first stop, because it has not reached its engine yet.
    void end_threads(std::unique_lock<std::mutex>& lock) {
        changed_.notify_all();
        while (left_ > hanging_) {
            for (std::size_t device = 0; device < devices_.size(); ++device)
                if (running_[device] && error_) devices_[device]->stop();
            told_.wait_for(lock, ASK_S);
        }
        std::vector<char> ended = ended_;
        lock.unlock();
        for (std::size_t i = 0; i < threads_.size(); ++i) {
            if (ended[i]) {
                threads_[i].join();
            } else {
                threads_[i].detach();
            }
        }
    }
};

Executor::Executor(std::vector<std::shared_ptr<Device>> devices, Named<Signature> signatures, double deadline_s, bool pass_by_pass)
    : devices_(std::move(devices)), signatures_(std::move(signatures)), deadline_s_(deadline_s), pass_by_pass_(pass_by_pass), state_{devices_.size(), {}, {}} {}

void Executor::run(const Task& task) { std::make_shared<Round>(*this, task)->run(); }

}  // namespace tw
