#include "harness/device/library_product.h"

#if TP_HAVE_CUBLASLT

#include <cublasLt.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <type_traits>

#include "harness/device/cuda/check.h"
#include "harness/device/cuda/queue.h"
#include "harness/device/streamed_size.h"

namespace tp {

namespace {

// cuBLASLt's functions, found when the program runs: without it, all products are our own.
struct Library {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtMatmulDescCreate) make_product = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) make_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) make_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) prefer = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) choose = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  cublasLtHandle_t handle = nullptr;  // nullptr: there is no library, or it does not work here

  Library() {
    const std::string file = fmt::format("libcublasLt.so.{}", CUBLAS_VER_MAJOR);
    void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return;
    bool all = true;
    const auto find = [&](auto& function, const char* name) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      all = all && function != nullptr;
    };
    find(create, "cublasLtCreate");
    find(make_product, "cublasLtMatmulDescCreate");
    find(set, "cublasLtMatmulDescSetAttribute");
    find(make_layout, "cublasLtMatrixLayoutCreate");
    find(make_preference, "cublasLtMatmulPreferenceCreate");
    find(prefer, "cublasLtMatmulPreferenceSetAttribute");
    find(choose, "cublasLtMatmulAlgoGetHeuristic");
    find(matmul, "cublasLtMatmul");
    if (all && create(&handle) != CUBLAS_STATUS_SUCCESS) handle = nullptr;
  }
};

const Library& cublaslt() {
  static const Library& library = *new Library;
  return library;
}

cudaDataType_t data_type(DType t) {
  switch (t) {
    case DType::f16:
      return CUDA_R_16F;
    case DType::bf16:
      return CUDA_R_16BF;
    case DType::e4m3:
      return CUDA_R_8F_E4M3;
    default:
      return CUDA_R_32F;
  }
}

// What the library does for products of one size. Its matrices are by columns: out^T = w x^T, of
// which w is read transposed.
struct Plan {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, out = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
};

// Nothing where the library has no algorithm, or fails.
std::optional<Plan> plan_of(const LibraryProduct& p, std::uint32_t alignment) {
  const Library& lt = cublaslt();
  bool ok = true;
  const auto call = [&](cublasStatus_t status) { ok = ok && status == CUBLAS_STATUS_SUCCESS; };
  Plan plan;
  call(lt.make_product(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transposed = CUBLAS_OP_T, plain = CUBLAS_OP_N;
  const auto set = [&](cublasLtMatmulDescAttributes_t what, const auto& value) {
    if (ok) call(lt.set(plan.product, what, &value, sizeof value));
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, transposed);
  set(CUBLASLT_MATMUL_DESC_TRANSB, plain);
  if (p.type == DType::e4m3) {
    set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, std::int8_t{1});
    set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, p.w_scale);
    set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, p.x_scale);
  }
  const auto layout = [&](cublasLtMatrixLayout_t& made, DType t, std::int64_t rows,
                          std::int64_t cols, std::int64_t stride) {
    call(lt.make_layout(&made, data_type(t), std::uint64_t(rows), std::uint64_t(cols), stride));
  };
  layout(plan.w, p.type, p.k, p.n, p.w_stride);
  layout(plan.x, p.type, p.k, p.m, p.x_stride);
  layout(plan.out, p.out_type, p.n, p.m, p.out_stride);
  // No split-K: sums that meet in another type or order would need a profile of their own. And no
  // workspace, which only that needs: whatever stream runs it, nothing is shared.
  cublasLtMatmulPreference_t preference = nullptr;
  call(lt.make_preference(&preference));
  const std::uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_NONE;
  const std::size_t workspace = 0;
  for (const auto of_operand :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    if (ok) call(lt.prefer(preference, of_operand, &alignment, sizeof alignment));
  }
  if (ok) {
    call(lt.prefer(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions,
                   sizeof reductions));
    call(lt.prefer(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                   sizeof workspace));
  }
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  if (ok) {
    call(lt.choose(lt.handle, plan.product, plan.w, plan.x, plan.out, plan.out, preference, 1,
                   &found, &count));
  }
  if (!ok || count == 0 || found.state != CUBLAS_STATUS_SUCCESS) return std::nullopt;
  plan.algorithm = found.algo;
  return plan;
}

// The largest power of two that x, w and out begin at multiples of, as far as the library asks.
std::uint32_t alignment_of(const LibraryProduct& p) {
  constexpr std::uintptr_t kMost = 256;
  const std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(p.x) |
                              reinterpret_cast<std::uintptr_t>(p.w) |
                              reinterpret_cast<std::uintptr_t>(p.out) | kMost;
  return std::uint32_t(bits & ~(bits - 1));
}

const std::optional<Plan>& cached_plan(const LibraryProduct& p) {
  using Key = std::array<std::int64_t, 9>;
  const std::uint32_t alignment = alignment_of(p);
  static auto& plans = *new std::map<Key, std::optional<Plan>>;
  const Key key = {int(p.type), int(p.out_type), p.m,          p.n,      p.k,
                   p.x_stride,  p.w_stride,      p.out_stride, alignment};
  auto at = plans.find(key);
  if (at == plans.end()) at = plans.emplace(key, plan_of(p, alignment)).first;
  return at->second;
}

bool is_aligned(const void* data, std::int64_t stride, DType t) {
  constexpr std::int64_t kBytes = 16;
  return std::int64_t(reinterpret_cast<std::uintptr_t>(data)) % kBytes == 0 &&
         stride * size_of(t) % kBytes == 0;
}

}  // namespace

bool open_library() { return cublaslt().handle != nullptr; }

bool library_takes(DType type, std::int64_t m, std::int64_t k) {
  return m > kMostStreamedRows && is_streamed(k, size_of(type)) && open_library();
}

bool library_matmul(const LibraryProduct& p, Stream& stream) {
  if (!library_takes(p.type, p.m, p.k) || p.n % 16 != 0) return false;
  if (!is_aligned(p.x, p.x_stride, p.type) || !is_aligned(p.w, p.w_stride, p.type) ||
      !is_aligned(p.out, p.out_stride, p.out_type)) {
    return false;
  }
  // Scales: it wants them aligned, too.
  const bool is_scaled = p.type == DType::e4m3;
  if (is_scaled != (p.x_scale != nullptr) || is_scaled != (p.w_scale != nullptr)) return false;
  if (!is_aligned(p.x_scale, 0, DType::f32) || !is_aligned(p.w_scale, 0, DType::f32)) return false;
  const std::optional<Plan>& plan = cached_plan(p);
  if (!plan) return false;
  const auto submit = [p, &plan = *plan, tp_rank = stream.tp_rank()](cudaStream_t to) {
    const Library& lt = cublaslt();
    if (p.type == DType::e4m3) {
      lt.set(plan.product, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &p.w_scale, sizeof p.w_scale);
      lt.set(plan.product, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &p.x_scale, sizeof p.x_scale);
    }
    const float one = 1, zero = 0;
    const cublasStatus_t status =
        lt.matmul(lt.handle, plan.product, &one, p.w, plan.w, p.x, plan.x, &zero, p.out, plan.out,
                  p.out, plan.out, &plan.algorithm, nullptr, 0, to);
    if (status != CUBLAS_STATUS_SUCCESS) {
      throw Fault{Outcome::BadLaunch,
                  fmt::format("cublasLtMatmul {} x {} x {}: status {}", p.m, p.n, p.k, int(status)),
                  tp_rank};
    }
  };
  stream.enqueue_kernel(
      std::make_unique<cuda::Submission>("cublasLtMatmul", cuda::Kind::kernel, stream, submit));
  return true;
}

}  // namespace tp

#else

namespace tp {

bool open_library() { return false; }
bool library_takes(DType, std::int64_t, std::int64_t) { return false; }
bool library_matmul(const LibraryProduct&, Stream&) { return false; }

}  // namespace tp

#endif
