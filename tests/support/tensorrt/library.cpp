// A library under the real Python bindings of TensorRT: every call of theirs goes to one function, which Python gives.
//
// A TensorRT object is a table of virtual methods and a pointer to its implementation. Here both are one object, and its
// method number n of kind k calls handler(k, n, arguments). The numbers are those that the bindings call.
#include <cstddef>
#include <cstdint>
#include <typeinfo>
#include <utility>

namespace {
using Handler = long (*)(int kind, int method, long, long, long, long, long, long, long, long, long);
Handler handler = nullptr;

constexpr int kinds = 20, methods = 96, factory = -1;
struct Mark {
    virtual ~Mark() = default;
};
struct Object {
    const void* const* table;
    Object* implementation;
};

// six arguments are in registers; a structure of 24 bytes, passed by value, is the three behind them
template <int Kind, int Method>
long method(long a, long b, long c, long d, long e, long f, long g, long h, long i) {
    return handler ? handler(Kind, Method, a, b, c, d, e, f, g, h, i) : 0;
}

// two entries before the first method are C++'s: the offset of the object, and its type
const void* tables[kinds][methods + 2];

template <int Kind, int... Method>
void fill(std::integer_sequence<int, Method...>) {
    const void* entries[] = {nullptr, &typeid(Mark), reinterpret_cast<const void*>(method<Kind, Method>)...};
    for (int i = 0; i < methods + 2; i++) tables[Kind][i] = entries[i];
}

template <int... Kind>
void fill_all(std::integer_sequence<int, Kind...>) {
    (fill<Kind>(std::make_integer_sequence<int, methods>()), ...);
}

const bool filled = (fill_all(std::make_integer_sequence<int, kinds>()), true);

void* made(int kind, void* first, void* second = nullptr) {
    return handler ? reinterpret_cast<void*>(handler(kind, factory, (long)first, (long)second, 0, 0, 0, 0, 0, 0, 0)) : nullptr;
}
}  // namespace

extern "C" {
void stub_handler(Handler function) { handler = function; }
void* stub_object(int kind) {
    Object* object = new Object{tables[kind] + 2, nullptr};
    object->implementation = object;
    return object;
}
// a message for the logger of Python
void stub_log(void* logger, int method, int severity, const char* text) {
    using Log = void (*)(void*, int, const char*);
    (*reinterpret_cast<Log**>(logger))[method](logger, severity, text);
}

// the numbers of the kinds are the order of KINDS in library.py
void* createInferBuilder_INTERNAL(void* logger, int) { return made(0, logger); }
void* createInferRefitter_INTERNAL(void* engine, void* logger, int) { return made(1, engine, logger); }
void* createInferRuntime_INTERNAL(void* logger, int) { return made(2, logger); }
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int) { return made(3, network, logger); }
void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int) { return nullptr; }
void* getPluginRegistry() {
    static Object* const registry = static_cast<Object*>(stub_object(kinds - 1));
    return registry;
}
void* getBuilderPluginRegistry() { return getPluginRegistry(); }
int getNvOnnxParserVersion() { return 0; }
bool initLibNvInferPlugins() { return true; }
}
