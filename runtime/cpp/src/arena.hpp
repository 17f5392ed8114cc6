// The memory that ONNX Runtime takes for the values inside of calls. All sessions of a process share one arena, so the largest call
// of all counts once. The arena gives free blocks back when an engine is opened or closed. As runtime/engines/arena.py.
#pragma once

#include <onnxruntime_cxx_api.h>

namespace tw {

Ort::Env& environment_of_process();
// Lets a session with these options use the shared arena.
void take_shared(Ort::SessionOptions& options);
// Gives memory that is free to the system: blocks of the arena, and those of the C library's allocator.
void give_back() noexcept;

}  // namespace tw
