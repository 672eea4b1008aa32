// The least that a call of a compiled program can cost: its C interface, called in a loop.
// Prints nanoseconds per call: a median of medians is left to the caller.
//
// c_abi LIBTORCH LIBRARY ROWS COLUMNS CALLS
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>

using Handle = void *;

template <typename F> F *find(void *library, const char *name) {
  void *found = dlsym(library, name);
  if (!found) {
    std::fprintf(stderr, "%s is not exported\n", name);
    std::exit(1);
  }
  return reinterpret_cast<F *>(found);
}

void *open(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::exit(1);
  }
  return library;
}

void check(int32_t status) {
  if (status) {
    std::fprintf(stderr, "a call failed\n");
    std::exit(1);
  }
}

int main(int count, char **args) {
  if (count != 6) return 2;
  void *torch = open(args[1]), *library = open(args[2]);
  auto empty = find<int32_t(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, Handle *)>(
      torch, "aoti_torch_empty_strided");
  auto zero = find<int32_t(Handle)>(torch, "aoti_torch_zero_");
  auto share = find<int32_t(Handle, Handle *)>(torch, "aoti_torch_new_tensor_handle");
  auto drop = find<int32_t(Handle)>(torch, "aoti_torch_delete_tensor_object");
  auto set_threads = find<void(int)>(torch, "_ZN2at15set_num_threadsEi");
  auto create = find<int32_t(void **, size_t, const char *, const char *)>(
      library, "AOTInductorModelContainerCreateWithDevice");
  auto run = find<int32_t(void *, Handle *, size_t, Handle *, size_t, void *, void *)>(
      library, "AOTInductorModelContainerRun");
  set_threads(1);
  void *container = nullptr;
  check(create(&container, 1, "cpu", nullptr));
  const int64_t sizes[] = {std::atoll(args[3]), std::atoll(args[4])}, strides[] = {sizes[1], 1};
  const int calls = std::atoi(args[5]);
  Handle input = nullptr;
  check(empty(2, sizes, strides, 6 /* float32 */, 0 /* CPU */, 0, &input));
  check(zero(input));
  auto loop = [&] {
    for (int number = 0; number < calls; ++number) {
      Handle given = nullptr, made = nullptr;
      check(share(input, &given));  // the program takes its inputs
      check(run(container, &given, 1, &made, 1, nullptr, nullptr));
      check(drop(made));
    }
  };
  loop();
  const auto start = std::chrono::steady_clock::now();
  loop();
  const std::chrono::duration<double, std::nano> passed = std::chrono::steady_clock::now() - start;
  std::printf("%f\n", passed.count() / calls);
}
