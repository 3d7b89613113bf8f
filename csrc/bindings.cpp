// The pybind11 module _C: addresses, sizes and codes in, kernels called with the GIL released, nothing else. It knows
// nothing of torch; sage_ext/_ops turns tensors into these arguments, in this order. One submodule a backend, each with
// the same functions. `where` is a thread count (cpu) or a device index (cuda), `stream` the caller's CUDA stream or 0.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "build_info.h"
#include "math/experts.h"
#include "math/frame.h"
#include "ops.h"
#if defined(SAGE_WITH_CUDA)
#include "cuda/query.h"
#endif
#include "stream/describe.h"
#include "stream/session.h"
#if !defined(SAGE_CUDA_ONLY)
#include "cpu/dispatch.h"
#endif

namespace py = pybind11;

#if defined(SAGE_SIMT)
void bind_simt(py::module_ m);  // tests/simt/control.cpp
int simt_device_of(uintptr_t stream);
#endif

namespace {

using Address = uintptr_t;
using sage::DType;
using sage::Exec;

void* at(Address a) { return reinterpret_cast<void*>(a); }

// A null address would crash the kernel: where there is work it is refused, by the argument's name.
void* need(const char* op, const char* name, Address a, int64_t numbers) {
  if (!a && numbers > 0)
    throw std::invalid_argument(std::string(op) + ": " + name + ": expected an address, got null");
  return at(a);
}

void within(const char* op, const char* name, int least, int most, int got) {
  if (got < least || got > most)
    throw std::invalid_argument(std::string(op) + ": " + name + ": expected " + std::to_string(least) +
                                " to " + std::to_string(most) + ", got " + std::to_string(got));
}

DType dtype_of(int code) {
  if (code < 0 || code > 3)
    throw std::invalid_argument("dtype code: expected 0 to 3, got " + std::to_string(code));
  return static_cast<DType>(code);
}

#if defined(SAGE_SIMT)
Exec exec_of(int, Address stream) { return {simt_device_of(stream), at(stream)}; }
#else
Exec exec_of(int where, Address stream) { return {where, at(stream)}; }
#endif

template <class Params>
using Launcher = void (*)(const Params&, Exec);

template <class Params>
void launch(Launcher<Params> op, const Params& params, Exec exec) {
  py::gil_scoped_release release;
  op(params, exec);
}

void check(bool fits, const char* message) {
  if (!fits) throw std::invalid_argument(message);
}

// values: one (address, row stride) a modality.
sage::ReliabilityFusionForward fusion_params(int dtype, int64_t rows, int64_t dim, int stages,
                                             const py::tuple& values, const py::tuple& strides,
                                             Address reliability, Address stage, Address log_temperature,
                                             Address bias, Address sharpness, Address present,
                                             Address norm_weight, Address norm_bias, double eps,
                                             Address fused, Address weights, Address confidence,
                                             Address stats) {
  const int modalities = static_cast<int>(values.size());
  within("reliability_fusion", "modalities", 1, sage::kMaxModalities, modalities);
  within("reliability_fusion", "stages", 1, sage::kMaxStages, stages);
  sage::ReliabilityFusionForward params = {};
  params.dtype = dtype_of(dtype);
  params.rows = rows, params.dim = dim, params.modalities = modalities, params.stages = stages;
  for (int m = 0; m < modalities; ++m) {
    params.values[m] = need("reliability_fusion", "values", values[m].cast<Address>(), rows * dim);
    params.row_stride[m] = strides[m].cast<int64_t>();
  }
  params.reliability = need("reliability_fusion", "reliability", reliability, rows);
  params.stage = at(stage), params.log_temperature = at(log_temperature), params.bias = at(bias),
  params.sharpness = at(sharpness);
  params.present = static_cast<const uint8_t*>(at(present));
  params.norm_weight = at(norm_weight), params.norm_bias = at(norm_bias);
  check(!params.norm_weight == !params.norm_bias,
        "reliability_fusion: norm_bias: expected together with norm_weight, got one of the two");
  params.eps = eps;
  params.fused = at(fused);
  params.weights = at(weights), params.confidence = at(confidence), params.stats = at(stats);
  return params;
}

sage::CccForward ccc_params(int dtype, int64_t groups, int64_t frames, int channels, Address pred,
                            Address target, Address mask, int mask_kind, Address moments, Address ccc,
                            Address workspace) {
  within("ccc", "mask_kind", 0, 2, mask_kind);
  sage::CccForward params = {};
  params.dtype = dtype_of(dtype);
  params.groups = groups, params.frames = frames, params.channels = channels;
  const int64_t numbers = groups * frames * channels;
  params.pred = need("ccc", "pred", pred, numbers), params.target = need("ccc", "target", target, numbers);
  params.mask = static_cast<const uint8_t*>(need("ccc", "mask", mask, mask_kind ? numbers : 0));
  params.mask_kind = static_cast<sage::Mask>(mask_kind);
  params.moments = static_cast<double*>(need("ccc", "moments", moments, groups * channels));
  params.ccc = at(ccc);
  params.workspace = static_cast<double*>(at(workspace));
  return params;
}

sage::TemporalCccForward temporal_params(int dtype, int64_t batch, int64_t frames, int channels, Address pred,
                                         Address target, Address mask, int mask_kind, int64_t window,
                                         double decay, int64_t history, Address state_in, Address workspace) {
  within("temporal_ccc", "mask_kind", 0, 2, mask_kind);
  sage::TemporalCccForward params = {};
  params.dtype = dtype_of(dtype);
  params.batch = batch, params.frames = frames, params.channels = channels;
  const int64_t numbers = batch * frames * channels;
  params.pred = need("temporal_ccc", "pred", pred, numbers),
  params.target = need("temporal_ccc", "target", target, numbers);
  params.mask = static_cast<const uint8_t*>(need("temporal_ccc", "mask", mask, mask_kind ? numbers : 0));
  params.mask_kind = static_cast<sage::Mask>(mask_kind);
  params.window = window, params.decay = decay, params.history = history;
  params.state_in = static_cast<const double*>(at(state_in));
  params.workspace = static_cast<double*>(at(workspace));
  return params;
}

sage::LeakyAverageForward leaky_average_params(int dtype, int64_t batch, int64_t frames, int64_t dim,
                                               int averages, bool causal, bool relative, Address x,
                                               Address precision, Address halflife, Address prior,
                                               Address state_in, Address average, Address state_out,
                                               Address workspace) {
  within("leaky_average", "averages", 1, sage::kMaxAverages, averages);
  sage::LeakyAverageForward params = {};
  params.dtype = dtype_of(dtype);
  params.batch = batch, params.frames = frames, params.dim = dim, params.averages = averages,
  params.causal = causal, params.relative = relative;
  params.x = need("leaky_average", "x", x, batch * frames * dim);
  params.precision = need("leaky_average", "precision", precision, batch * frames);
  params.halflife = need("leaky_average", "halflife", halflife, batch);
  params.prior = need("leaky_average", "prior", prior, batch);
  params.state_in = at(state_in);
  params.average = need("leaky_average", "average", average, batch * frames * dim);
  params.state_out = at(state_out);
  params.workspace = static_cast<double*>(need("leaky_average", "workspace", workspace, batch));
  return params;
}

// A backend's launchers, each under its name in SAGE_OPS.
struct Backend {
#define SAGE_FIELD(op, Params) Launcher<sage::Params> op;
  SAGE_OPS(SAGE_FIELD)
#undef SAGE_FIELD
};

void bind_backend(py::module_ m, const Backend& on) {
  m.def("stage_filter_forward", [run = on.stage_filter_forward](
                                    int dtype, int64_t batch, int64_t frames, int stages, Address emission,
                                    Address transition, Address initial, int64_t initial_stride, Address mask,
                                    Address posterior, Address belief, Address final_belief, int where,
                                    Address stream) {
    within("stage_filter", "stages", 1, sage::kMaxStages, stages);
    const int64_t numbers = batch * frames;
    launch(run,
           sage::StageFilterForward{
               dtype_of(dtype), batch, frames, stages, need("stage_filter", "emission", emission, numbers),
               need("stage_filter", "transition", transition, 1), at(initial), initial_stride,
               static_cast<const uint8_t*>(at(mask)), need("stage_filter", "posterior", posterior, numbers),
               at(belief), need("stage_filter", "final", final_belief, batch)},
           exec_of(where, stream));
  });
  m.def("stage_filter_backward", [run = on.stage_filter_backward](
                                     int dtype, int64_t batch, int64_t frames, int stages, Address emission,
                                     Address transition, Address initial, int64_t initial_stride,
                                     Address mask, Address posterior, Address belief, Address grad_posterior,
                                     Address grad_final, Address grad_emission, Address grad_transition,
                                     Address grad_initial, Address workspace, int where, Address stream) {
    within("stage_filter", "stages", 1, sage::kMaxStages, stages);
    const int64_t numbers = batch * frames;
    launch(run,
           sage::StageFilterBackward{dtype_of(dtype), batch, frames, stages,
                                     need("stage_filter_backward", "emission", emission, numbers),
                                     need("stage_filter_backward", "transition", transition, 1), at(initial),
                                     initial_stride, static_cast<const uint8_t*>(at(mask)),
                                     need("stage_filter_backward", "posterior", posterior, numbers),
                                     need("stage_filter_backward", "belief", belief, numbers),
                                     at(grad_posterior), at(grad_final),
                                     need("stage_filter_backward", "grad_emission", grad_emission, numbers),
                                     need("stage_filter_backward", "grad_transition", grad_transition, 1),
                                     at(grad_initial), static_cast<double*>(at(workspace))},
           exec_of(where, stream));
  });
  m.def(
      "reliability_fusion_forward",
      [run = on.reliability_fusion_forward](
          int dtype, int64_t rows, int64_t dim, int stages, const py::tuple& values, const py::tuple& strides,
          Address reliability, Address stage, Address log_temperature, Address bias, Address sharpness,
          Address present, Address norm_weight, Address norm_bias, double eps, Address fused, Address weights,
          Address confidence, Address stats, int where, Address stream) {
        launch(run,
               fusion_params(dtype, rows, dim, stages, values, strides, reliability, stage, log_temperature,
                             bias, sharpness, present, norm_weight, norm_bias, eps, fused, weights,
                             confidence, stats),
               exec_of(where, stream));
      });
  m.def("reliability_fusion_backward",
        [run = on.reliability_fusion_backward](
            int dtype, int64_t rows, int64_t dim, int stages, const py::tuple& values,
            const py::tuple& strides, Address reliability, Address stage, Address log_temperature,
            Address bias, Address sharpness, Address present, Address norm_weight, Address norm_bias,
            double eps, Address weights, Address stats, Address grad_fused, Address grad_weights,
            Address grad_confidence, const py::tuple& grad_values, Address grad_reliability,
            Address grad_stage, Address grad_params, Address workspace, int where, Address stream) {
          sage::ReliabilityFusionBackward params = {};
          params.forward =
              fusion_params(dtype, rows, dim, stages, values, strides, reliability, stage, log_temperature,
                            bias, sharpness, present, norm_weight, norm_bias, eps, 0, weights, 0, stats);
          params.grad_fused = at(grad_fused), params.grad_weights = at(grad_weights),
          params.grad_confidence = at(grad_confidence);
          for (int i = 0; i < params.forward.modalities; ++i)
            params.grad_values[i] = at(grad_values[i].cast<Address>());
          params.grad_reliability =
              need("reliability_fusion_backward", "grad_reliability", grad_reliability, rows);
          params.grad_stage = at(grad_stage);
          params.grad_params = need("reliability_fusion_backward", "grad_params", grad_params, 1);
          params.workspace = static_cast<double*>(at(workspace));
          launch(run, params, exec_of(where, stream));
        });
  m.def("ccc_forward", [run = on.ccc_forward](int dtype, int64_t groups, int64_t frames, int channels,
                                              Address pred, Address target, Address mask, int mask_kind,
                                              Address moments, Address ccc, Address workspace, int where,
                                              Address stream) {
    launch(
        run,
        ccc_params(dtype, groups, frames, channels, pred, target, mask, mask_kind, moments, ccc, workspace),
        exec_of(where, stream));
  });
  m.def("ccc_backward",
        [run = on.ccc_backward](int dtype, int64_t groups, int64_t frames, int channels, Address pred,
                                Address target, Address mask, int mask_kind, Address moments,
                                Address grad_ccc, Address grad_moments, Address grad_pred,
                                Address grad_target, int where, Address stream) {
          sage::CccBackward params = {};
          params.forward =
              ccc_params(dtype, groups, frames, channels, pred, target, mask, mask_kind, moments, 0, 0);
          params.grad_ccc = at(grad_ccc), params.grad_moments = static_cast<const double*>(at(grad_moments));
          check(!params.grad_ccc != !params.grad_moments || groups * channels == 0,
                "ccc_backward: expected one of grad_ccc and grad_moments, got none or both");
          params.grad_pred = at(grad_pred), params.grad_target = at(grad_target);
          launch(run, params, exec_of(where, stream));
        });
  m.def("temporal_ccc_forward", [run = on.temporal_ccc_forward](
                                    int dtype, int64_t batch, int64_t frames, int channels, Address pred,
                                    Address target, Address mask, int mask_kind, int64_t window, double decay,
                                    int64_t history, Address state_in, int64_t history_out, Address state_out,
                                    Address rho, Address defined, Address workspace, int where,
                                    Address stream) {
    sage::TemporalCccForward params = temporal_params(dtype, batch, frames, channels, pred, target, mask,
                                                      mask_kind, window, decay, history, state_in, workspace);
    const int64_t numbers = batch * frames * channels;
    params.history_out = history_out, params.state_out = static_cast<double*>(at(state_out));
    params.rho = need("temporal_ccc", "rho", rho, numbers);
    params.defined = static_cast<uint8_t*>(need("temporal_ccc", "defined", defined, numbers));
    launch(run, params, exec_of(where, stream));
  });
  m.def("temporal_ccc_backward",
        [run = on.temporal_ccc_backward](int dtype, int64_t batch, int64_t frames, int channels, Address pred,
                                         Address target, Address mask, int mask_kind, int64_t window,
                                         double decay, int64_t history, Address state_in, Address grad_rho,
                                         Address grad_pred, Address grad_target, Address workspace, int where,
                                         Address stream) {
          sage::TemporalCccBackward params = {};
          params.forward = temporal_params(dtype, batch, frames, channels, pred, target, mask, mask_kind,
                                           window, decay, history, state_in, workspace);
          params.grad_rho = need("temporal_ccc_backward", "grad_rho", grad_rho, batch * frames * channels);
          params.grad_pred = at(grad_pred), params.grad_target = at(grad_target);
          launch(run, params, exec_of(where, stream));
        });
  m.def("leaky_average_forward",
        [run = on.leaky_average_forward](int dtype, int64_t batch, int64_t frames, int64_t dim, int averages,
                                         bool causal, bool relative, Address x, Address precision,
                                         Address halflife, Address prior, Address state_in, Address average,
                                         Address state_out, Address workspace, int where, Address stream) {
          need("leaky_average", "state_out", state_out, batch);
          launch(run,
                 leaky_average_params(dtype, batch, frames, dim, averages, causal, relative, x, precision,
                                      halflife, prior, state_in, average, state_out, workspace),
                 exec_of(where, stream));
        });
  m.def("leaky_average_backward",
        [run = on.leaky_average_backward](
            int dtype, int64_t batch, int64_t frames, int64_t dim, int averages, bool causal, bool relative,
            Address x, Address precision, Address halflife, Address prior, Address state_in, Address average,
            Address grad_average, Address grad_state_out, Address grad_x, Address grad_precision,
            Address grad_prior, Address grad_state_in, Address workspace, int where, Address stream) {
          sage::LeakyAverageBackward params = {};
          params.forward = leaky_average_params(dtype, batch, frames, dim, averages, causal, relative, x,
                                                precision, halflife, prior, state_in, average, 0, workspace);
          params.grad_average = at(grad_average), params.grad_state_out = at(grad_state_out);
          params.grad_x = need("leaky_average_backward", "grad_x", grad_x, batch * frames * dim);
          params.grad_precision =
              need("leaky_average_backward", "grad_precision", grad_precision, batch * frames);
          params.grad_prior = need("leaky_average_backward", "grad_prior", grad_prior, batch);
          params.grad_state_in = at(grad_state_in);
          launch(run, params, exec_of(where, stream));
        });
}

using sage::stream::Session;

// The rows a call is about, by address: checked here, for they index memory.
const int64_t* rows_of(const Session& session, Address which, int64_t count) {
  const int64_t* rows = static_cast<const int64_t*>(need("stream", "rows", which, count));
  for (int64_t i = 0; i < count; ++i)
    check(rows[i] >= 0 && rows[i] < session.rows(), "stream: row out of range");
  return rows;
}

// The model's shape from a dict of its numbers by name.
sage::stream::Shape shape_of(const py::dict& given) {
  sage::stream::Shape s = {};
  size_t read = 0;
  const auto number = [&](const char* name, auto& to) {
    if (!given.contains(name)) throw py::key_error(std::string("stream: the shape has no ") + name);
    to = given[name].cast<std::decay_t<decltype(to)>>();
    ++read;
  };
  py::tuple in_dims;
  number("in_dims", in_dims);
  s.modalities = static_cast<int>(in_dims.size());
  check(s.modalities <= sage::kMaxModalities, "stream: 1..8 modalities");
  for (int k = 0; k < s.modalities; ++k) s.in_dim[k] = in_dims[k].cast<int64_t>();
  number("dim", s.dim), number("targets", s.targets), number("own_blocks", s.own_blocks);
  number("fused_blocks", s.fused_blocks), number("kernel", s.kernel), number("reliability", s.reliability);
  number("stages", s.stages), number("evidence", s.evidence), number("window", s.window);
  number("value_norm", s.value_norm), number("hide_missing", s.hide_missing), number("bf16", s.bf16);
  number("memory", s.memory), number("stuck", s.stuck), number("joint", s.joint);
  number("foreign", s.foreign);
  py::tuple quality_dims;
  number("quality_dims", quality_dims);
  check(int(quality_dims.size()) == s.modalities, "stream: a number of columns of quality each modality");
  for (int k = 0; k < s.modalities; ++k) s.quality_dim[k] = quality_dims[k].cast<int>();
  check(read == given.size(), "stream: the shape has a number of no known name");
  return s;
}

// Lists of (name, shape): the tensors that a session is opened with, and the parts of a stream's state.
struct Lists : sage::stream::Visitor {
  py::list tensors, parts;
  static void add(py::list& to, const std::string& name, sage::stream::Extents shape) {
    py::tuple sizes(shape.size());
    size_t i = 0;
    for (const int64_t n : shape) sizes[i++] = n;
    to.append(py::make_tuple(name, sizes));
  }
  void rows(const std::string& name, sage::stream::Extents shape, const float*&) {
    add(tensors, name, shape);
  }
  void numbers(const std::string& name, sage::stream::Extents shape, float*) { add(tensors, name, shape); }
  void linear(const std::string& name, int64_t inputs, int64_t outputs, sage::stream::Linear&) {
    add(tensors, name + ".weight", {outputs, inputs}), add(tensors, name + ".bias", {outputs});
  }
  void state(const std::string& name, sage::stream::Extents shape, sage::stream::Part*, int) {
    add(parts, name, shape);
  }
};

using OpenSession = Session* (*)(const sage::stream::Shape&, sage::stream::Tensors, int64_t, int);

// tensors: (name, shape, address) of each tensor that describe_stream lists, in its order.
template <OpenSession open>
void bind_open_session(py::module_ m) {
  m.def("open_session", [](const py::dict& shape, const py::sequence& tensors, int64_t rows, int where) {
    std::vector<std::string> names(tensors.size());
    std::vector<std::vector<int64_t>> sizes(tensors.size());
    std::vector<sage::stream::Tensor> all(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const py::tuple one = tensors[i].cast<py::tuple>();
      names[i] = one[0].cast<std::string>();
      for (const py::handle n : one[1].cast<py::tuple>()) sizes[i].push_back(n.cast<int64_t>());
      all[i] = {names[i].c_str(), sizes[i].data(), static_cast<int>(sizes[i].size()),
                static_cast<const float*>(at(one[2].cast<Address>()))};
    }
    return open(shape_of(shape), {all.data(), static_cast<int64_t>(all.size())}, rows,
                exec_of(where, 0).where);
  });
}

// The addresses of a step's outputs, in the order of the struct.
sage::stream::Outputs outputs_of(const Session& session, const py::tuple& addresses) {
  check(addresses.size() == sage::stream::kOutputs, "stream: one address an output");
  sage::stream::Outputs outputs = {};
  int next = 0;
  sage::stream::for_each_output(session.shape(), outputs, [&](auto*& to, int64_t numbers) {
    const Address address = addresses[next++].cast<Address>();
    to = static_cast<std::decay_t<decltype(to)>>(need("stream", "outputs", address, numbers));
  });
  return outputs;
}

void bind_session(py::module_ m) {
  py::class_<Session>(m, "StreamSession", py::module_local())
      .def("step",
           [](Session& session, const py::tuple& features, Address quality, Address present, Address active,
              uint32_t on_device, const py::tuple& outputs, int where, Address stream) {
             sage::stream::Frame frame = {};
             const int modalities = session.shape().modalities;
             check(static_cast<int>(features.size()) == modalities, "stream: one address a modality");
             for (int k = 0; k < modalities; ++k)
               frame.features[k] =
                   static_cast<const float*>(need("stream", "features", features[k].cast<Address>(), 1));
             frame.quality = static_cast<const float*>(at(quality));
             frame.present = static_cast<const uint8_t*>(at(present));
             frame.active = static_cast<const uint8_t*>(at(active));
             frame.on_device = on_device;
             const sage::stream::Outputs to = outputs_of(session, outputs);
             py::gil_scoped_release release;
             session.step(frame, to, exec_of(where, stream));
           })
      .def("reset",
           [](Session& session, Address which, int64_t count, const py::tuple& outputs) {
             const int64_t* rows = rows_of(session, which, count);
             const sage::stream::Outputs to = outputs_of(session, outputs);
             py::gil_scoped_release release;
             session.reset(rows, count, to);
           })
      .def("read",
           [](Session& session, Address which, int64_t count, Address state, Address frames) {
             const int64_t* rows = rows_of(session, which, count);
             float* to = static_cast<float*>(need("stream", "state", state, count));
             int64_t* taken = static_cast<int64_t*>(need("stream", "frames", frames, count));
             py::gil_scoped_release release;
             session.read(rows, count, to, taken);
           })
      .def("write",
           [](Session& session, Address which, int64_t count, Address state, Address frames,
              const py::tuple& outputs) {
             const int64_t* rows = rows_of(session, which, count);
             const float* from = static_cast<const float*>(need("stream", "state", state, count));
             const int64_t* taken = static_cast<const int64_t*>(need("stream", "frames", frames, count));
             const sage::stream::Outputs to = outputs_of(session, outputs);
             py::gil_scoped_release release;
             session.write(rows, count, from, taken, to);
           })
      .def("totals", [](Session& session) {  // frames, and a modality: (frames without it, those refused)
        sage::stream::Totals totals;
        {
          py::gil_scoped_release release;
          totals = session.totals();
        }
        py::list all;
        for (int k = 0; k < session.shape().modalities; ++k)
          all.append(py::make_tuple(totals.absent[k], totals.refused[k]));
        return py::make_tuple(totals.frames, all);
      });
  m.def("describe_stream", [](const py::dict& shape) {
    sage::stream::Model model = {};
    model.shape = shape_of(shape);
    sage::stream::check_shape(model.shape);
    Lists lists;
    sage::stream::describe(model, lists);
    return py::make_tuple(lists.tensors, lists.parts);
  });
}

}  // namespace

PYBIND11_MODULE(SAGE_MODULE_NAME, m) {
  m.def("stage_filter_workspace", &sage::stage_filter_workspace);
  m.def("reliability_fusion_param_count", &sage::reliability_fusion_param_count);
  m.def("reliability_fusion_workspace", &sage::reliability_fusion_workspace);
  m.def("ccc_workspace", &sage::ccc_workspace);
  m.def("temporal_ccc_workspace", &sage::temporal_ccc_workspace);
  m.def("leaky_average_workspace", &sage::leaky_average_workspace);
  m.attr("max_averages") = sage::kMaxAverages;
  m.attr("max_modalities") = sage::kMaxModalities;
  m.attr("max_stages") = sage::kMaxStages;
  m.attr("max_memory") = sage::stream::kMaxMemory;
  m.attr("max_blocks") = sage::stream::kMaxBlocks;
  m.attr("build_info") = SAGE_BUILD_INFO;  // JSON
  py::dict constants;
  constants["norm_eps"] = sage::stream::kNormEps;
  constants["energy_floor"] = sage::kEnergyFloor;
  constants["variance_floor"] = sage::kVarianceFloor;
  constants["typicality_limit"] = sage::kTypicalityLimit;
  constants["quality_halflife"] = sage::kQualityHalflife;
  constants["foreign_margin"] = sage::kForeignMargin;
  constants["log_precision_limit"] = sage::kLogPrecisionLimit;
  m.attr("constants") = constants;
  bind_session(m);

#if !defined(SAGE_CUDA_ONLY)
  py::module_ on_cpu = m.def_submodule("cpu");
#define SAGE_ON_CPU(op, Params) sage::cpu::op,
  bind_backend(on_cpu, {SAGE_OPS(SAGE_ON_CPU)});
  bind_open_session<sage::cpu::open_session>(on_cpu);
  m.def("isa_variants", [] {  // (name, built, supported by this machine)
    py::list all;
    for (int i = 0; i < 3; ++i)
      all.append(
          py::make_tuple(sage::cpu::kIsaNames[i], sage::cpu::isa_built(i), sage::cpu::isa_supported(i)));
    return all;
  });
  m.def("isa", [] { return sage::cpu::kIsaNames[sage::cpu::isa()]; });
  m.def("set_isa", [](const std::string& name) {
    for (int i = 0; i < 3; ++i) {
      if (name != sage::cpu::kIsaNames[i]) continue;
      if (!sage::cpu::isa_built(i))
        throw std::invalid_argument("CPU kernels for " + name + " are not in this build");
      if (!sage::cpu::isa_supported(i)) throw std::invalid_argument("this machine has no " + name);
      return sage::cpu::set_isa(i);
    }
    throw std::invalid_argument("SAGE_EXT_CPU_ISA: expected baseline, avx2 or avx512, got '" + name + "'");
  });
#endif
#if defined(SAGE_WITH_CUDA)
  py::module_ on_cuda = m.def_submodule("cuda");
#define SAGE_ON_CUDA(op, Params) sage::cuda::op,
  bind_backend(on_cuda, {SAGE_OPS(SAGE_ON_CUDA)});
  bind_open_session<sage::cuda::open_session>(on_cuda);
  m.def("cuda_versions", &sage::cuda::versions);
  m.def("cuda_problem", &sage::cuda::problem);
#endif
#if defined(SAGE_SIMT)
  bind_simt(m.def_submodule("simt"));
#endif
}
