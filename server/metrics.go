package server

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"verve/counter"
	"verve/dedup"
	"verve/server/callback"
)

// Buckets of the histograms, in seconds. A request takes microseconds, or up to the
// slow timeout if the client does not read its answer. A callback takes as long as its
// network, up to its timeout. An epoch takes an fsync.
var (
	requestBuckets  = []float64{1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}
	callbackBuckets = []float64{5e-4, 1e-3, 2.5e-3, 5e-3, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	epochBuckets    = []float64{5e-4, 1e-3, 2.5e-3, 5e-3, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}
)

// histogram is a histogram with classic buckets. Each has a set of its own, because the
// library writes only whole sets as text.
type histogram struct {
	set *metrics.Set
	*metrics.PrometheusHistogram
}

func newHistogram(name string, buckets []float64) histogram {
	set := metrics.NewSet()
	return histogram{set, set.NewPrometheusHistogramExt(name, buckets)}
}

func (h histogram) observe(d time.Duration) { h.Update(d.Seconds()) }

// Times are the histograms of durations that other packages measure. They are made before the
// parts that fill them. All methods are safe for concurrent use.
type Times struct{ sealDelay, closeTook, callback histogram }

// NewTimes makes empty histograms.
func NewTimes() *Times {
	return &Times{
		sealDelay: newHistogram("verve_epoch_seal_delay_seconds", epochBuckets),
		closeTook: newHistogram("verve_epoch_close_duration_seconds", epochBuckets),
		callback:  newHistogram("verve_callback_duration_seconds", callbackBuckets),
	}
}

// EpochClosed records how long the epoch of c took to drain and publish. If c is complete, it
// also records how late the epoch was sealed.
func (t *Times) EpochClosed(c counter.Count, took time.Duration) {
	if c.Complete && !c.SealedAt.IsZero() {
		t.sealDelay.observe(max(0, c.SealedAt.Sub(c.Start.Add(c.Window))))
	}
	t.closeTook.observe(took)
}

// CallbackEnded records the duration of a callback's exchange.
func (t *Times) CallbackEnded(took time.Duration) { t.callback.observe(took) }

// exposition writes families of metrics in the text format of Prometheus.
type exposition struct{ w io.Writer }

func (e exposition) family(name, kind, help string) {
	fmt.Fprintf(e.w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

func (e exposition) counter(name, help string, n uint64) {
	e.family(name, "counter", help)
	metrics.WriteCounterUint64(e.w, name, n)
}

func (e exposition) counters(name, help, label string, values []resultCount) {
	e.family(name, "counter", help)
	for _, v := range values {
		metrics.WriteCounterUint64(e.w, name+"{"+label+"="+strconv.Quote(v.Result)+"}", v.Count)
	}
}

func (e exposition) gauge(name, help string, v float64) {
	e.family(name, "gauge", help)
	e.value(name, v)
}

// value writes whole numbers as such, however large.
func (e exposition) value(name string, v float64) {
	fmt.Fprintf(e.w, "%s %s\n", name, strconv.FormatFloat(v, 'f', -1, 64))
}

// labelValue quotes a value for the text format, which has fewer escapes than Go.
func labelValue(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s) + `"`
}

func (e exposition) histogram(name, help string, h histogram) {
	e.family(name, "histogram", help)
	h.set.WritePrometheus(e.w)
}

// resultCount is one line of a table of outcomes.
type resultCount struct {
	Result string `json:"result"`
	Count  uint64 `json:"count"`
}

// acceptResults are the answers of the accept route; the names are part of the
// contract.
func (s *Server) acceptResults() []resultCount {
	c := s.cfg.Counter.Stats()
	judged := []resultCount{{"ok", c.Unique}, {"duplicate", c.Repeats}, {"replayed", s.replayed.Load()}}
	return append(judged, s.refusedFor(reasonBadID, reasonBadKey, reasonBadToken, reasonBadEndpoint,
		reasonUnavailable, reasonFull, reasonBusy, reasonDraining)...)
}

// otherRefusals returns the refusals that are not in acceptResults.
func (s *Server) otherRefusals() []resultCount {
	return s.refusedFor(reasonBadRequest, reasonMethod, reasonNotFound, reasonTooLarge, reasonTooSlow, reasonPanic)
}

// refusedFor returns how many requests, or ids of batches, were refused for each reason.
func (s *Server) refusedFor(of ...reason) (counts []resultCount) {
	for _, r := range of {
		counts = append(counts, resultCount{strings.ReplaceAll(r.String(), "-", "_"), s.refused[r].Load()})
	}
	return counts
}

// refusals returns how many requests, or ids of batches, were refused, for any reason.
func (s *Server) refusals() (n uint64) {
	for i := range s.refused {
		n += s.refused[i].Load()
	}
	return n
}

func callbackResults(cb callback.Stats) (counts []resultCount) {
	for r, n := range cb.Ended {
		counts = append(counts, resultCount{callback.Result(r).String(), n})
	}
	return counts
}

// writeMetrics writes all metrics as Prometheus text. Their
// names are here only, and no label ever comes from a caller.
func (a *Admin) writeMetrics(w io.Writer) {
	e, s := exposition{w}, a.server
	e.counters("verve_accept_total", "Ids answered, by result.", "result", s.acceptResults())
	e.counter("verve_batches_total", "Requests with a batch of ids that were answered.", s.batches.answered.Load())
	e.counters("verve_http_refused_total", "Requests refused before an id was judged, by reason.", "reason", s.otherRefusals())
	e.histogram("verve_request_duration_seconds",
		fmt.Sprintf("Time from receiving a request to handing its answer to the kernel, sampled at every %dth read from a connection.", sampleEvery), s.ln.took)

	c := s.cfg.Counter.Stats()
	recent := a.recent(1)
	e.gauge("verve_unique_ids", "Unique ids in the open window.", float64(recent.Open.Unique))
	e.gauge("verve_keys", "Keys under which ids were counted in the open window, by this instance.", float64(recent.Open.Keys))
	e.gauge("verve_window_seconds", "Length of the open window.", float64(recent.Open.MS)/1e3)
	var last window
	if len(recent.Windows) > 0 {
		last = recent.Windows[0]
	}
	e.gauge("verve_last_window_unique_ids", "Unique ids in the last closed window.", float64(last.Unique))
	e.gauge("verve_last_window_start_timestamp_seconds", "Start of the last closed window, Unix time; 0 before the first.", max(0, float64(last.Start.UnixMilli())/1e3))
	e.gauge("verve_epochs_unclosed", "Epochs that have ended and whose count is not yet in the spool, or reported to the group.", float64(c.Unclosed))
	e.counter("verve_epochs_skipped_total", "Epochs that were not opened, as the clock was set forward or the process did not run.", c.Skipped)
	e.counter("verve_windows_lost_total", "Windows that an earlier process left and that no record can be made of, as a later one has its record.", uint64(c.Lost))
	e.gauge("verve_clock_behind_seconds", "How far the clock is behind the start of the open epoch.", c.Clock.Behind.Seconds())
	e.counters("verve_clock_steps_total", "Steps of the clock, by direction.", "direction", []resultCount{
		{"forward", c.Clock.Forward}, {"back", c.Clock.Back},
	})
	e.counter("verve_process_pauses_total", "Pauses of the process longer than --max-clock-skew.", c.Clock.Pauses)
	e.family("verve_process_paused_seconds_total", "counter", "Total time the process was paused, in seconds.")
	e.value("verve_process_paused_seconds_total", c.Clock.Paused.Seconds())
	e.histogram("verve_epoch_seal_delay_seconds", "Delay from the end of an epoch until it was sealed.", a.cfg.Times.sealDelay)
	e.histogram("verve_epoch_close_duration_seconds", "Time to drain an epoch's last requests and publish its count.", a.cfg.Times.closeTook)

	d := s.cfg.Set.Stats()
	e.gauge("verve_max_ids", "Maximum ids that the window can hold: --max-ids, or an estimate of what fits into the memory allowed; 0 if unknown.", float64(d.Fit))
	e.gauge("verve_dedup_bytes", "Memory of the tables of ids.", float64(d.Bytes))
	e.gauge("verve_dedup_slots", "Slots in the tables of ids, used or free.", float64(d.Slots))
	e.gauge("verve_dedup_levels", "Depth of the deepest chain of tables.", float64(d.Levels))
	e.gauge("verve_dedup_kept_bytes", "Size of the files with the ids of epochs whose record is not yet in the spool, for the next start.", float64(d.Kept))
	e.counter("verve_dedup_grown_total", "Tables added while an epoch ran.", d.Grown)
	e.counter("verve_dedup_resized_total", "Tables replaced by one of a better size.", d.Resized)
	e.counter("verve_dedup_reclaimed_total", "Slots of past epochs reclaimed.", d.Reclaimed)
	e.counter("verve_dedup_full_total", "Ids refused because there was no room.", d.Full)

	ready := a.readiness()
	e.gauge("verve_ready", "1 if /readyz answers 200, 0 if it answers 503.", flag(ready.Ready))
	e.family("verve_dependency_up", "gauge", "1 if the dependency works.")
	for _, name := range slices.Sorted(maps.Keys(ready.Checks)) {
		e.value("verve_dependency_up{dependency="+strconv.Quote(name)+"}", flag(ready.Checks[name].OK))
	}
	r := a.cfg.Records()
	e.counter("verve_records_published_total", "Records acknowledged by every sink.", r.Published)
	e.gauge("verve_records_pending", "Records in the spool.", float64(r.Pending))
	e.gauge("verve_records_oldest_age_seconds", "Time since the oldest record in the spool was sealed.", age(r.Oldest))
	e.gauge("verve_records_poison", "Dead letters: records that a sink has refused for good.", float64(r.Poison))
	e.counter("verve_records_conflicts_total", "Records whose key a sink already holds with another value: two processes share a name.", r.Conflicts)
	e.counter("verve_spool_append_failures_total", "Failed attempts to write a record to the spool.", r.AppendFailures)

	cb := s.cfg.Callbacks.Stats()
	e.counters("verve_callbacks_total", "Callbacks, by result.", "result", callbackResults(cb))
	e.histogram("verve_callback_duration_seconds", "Time from dialling a callback's endpoint to the end of its answer.", a.cfg.Times.callback)
	e.counter("verve_callbacks_retried_total", "Callbacks sent again because a pooled connection was dead.", cb.Retried)
	e.gauge("verve_callbacks_waiting", "Endpoints with a waiting POST.", float64(cb.Waiting))
	e.gauge("verve_callbacks_in_flight", "POSTs in flight.", float64(cb.InFlight))
	e.gauge("verve_callback_destinations", "Destinations that the server keeps state for.", float64(cb.Destinations))
	e.gauge("verve_callback_breakers_open", "Destinations whose circuit breaker is open.", float64(cb.BreakersOpen))

	e.gauge("verve_connections", "Connections open on the public listener.", float64(s.ln.open()))
	e.gauge("verve_connections_limit", "Connections that may be open on the public listener.", float64(s.cfg.limits.MaxConns))
	e.gauge("verve_connections_served", "Connections with a request, or without one for less than a second.", float64(len(s.ln.served)))
	e.gauge("verve_connections_served_limit", "Connections that may have a request at once; others wait.", float64(cap(s.ln.served)))
	adminOpen, adminEnded := a.conns.stats()
	e.gauge("verve_admin_connections", "Connections open on the admin listener.", float64(adminOpen))
	e.counter("verve_admin_connections_ended_total", "Connections closed because the admin listener had too many.", adminEnded)
	e.counters("verve_accept_errors_total", "Connections that could not be accepted, by listener; tried again after a wait.", "listener", []resultCount{
		{"public", s.ln.failed.Load()}, {"admin", a.ln.failed.Load()},
	})
	e.counters("verve_connections_rejected_total", "Connections rejected, by limit: of all connections, or of one client address.", "limit", []resultCount{
		{"all", s.ln.rejected.Load()}, {"address", s.ln.rejectedAddr.Load()},
	})
	e.counters("verve_connections_ended_total", "Connections closed by the server, by reason.", "reason", []resultCount{
		{"slow", s.ln.slowClosed.Load()}, {"idle", s.ln.idleClosed.Load()},
	})
	e.counter("verve_test_posts_total", "POSTs answered by /test.", s.sunk.Load())

	if cert := s.cfg.TLS; cert != nil {
		e.counter("verve_tls_handshake_failures_total", "Failed TLS handshakes.", s.ln.badHandshakes.Load())
		e.counter("verve_tls_reload_failures_total", "Failed attempts to load a changed certificate.", cert.failures.Load())
		e.gauge("verve_tls_certificate_not_after_seconds", "End of the certificate's validity, Unix time.", float64(cert.notAfter().Unix()))
	}

	if a.cfg.LogDropped != nil {
		e.counter("verve_log_lines_dropped_total", "Log lines dropped because the reader of standard error was too slow or gone.", a.cfg.LogDropped())
	}
	e.family("verve_build_info", "gauge", "Always 1; the labels are the version and the Go release that built it.")
	e.value("verve_build_info{version="+labelValue(a.cfg.Version)+",go="+labelValue(runtime.Version())+"}", 1)
	dedup := "memory"
	if a.cfg.Shared != nil {
		dedup = "redis"
	}
	e.family("verve_info", "gauge", "Always 1; the labels are --group, the name of the instance, and --dedup.")
	e.value("verve_info{group="+labelValue(a.cfg.Group)+",instance="+labelValue(a.cfg.Instance)+",dedup="+labelValue(dedup)+"}", 1)
	writeProcess(w)
	if a.cfg.Shared != nil {
		e.group(a.cfg.Shared())
	}
}

// group writes the metrics of a group and its Redis.
func (e exposition) group(g dedup.GroupStats) {
	e.gauge("verve_group_unique_ids", "Unique ids of the whole group in the open window, as last reported by Redis.", float64(g.Unique))
	e.gauge("verve_group_members", "Live instances of the group, including this one.", float64(g.Members))
	e.gauge("verve_group_leader", "1 if this instance publishes the records of the group.", flag(g.Leading))
	e.gauge("verve_group_epochs_waiting", "Windows not known to be delivered, including the open one.", float64(g.Waiting))
	e.gauge("verve_group_clock_offset_seconds", "How far the clock of Redis is ahead of the clock of this machine.", g.Offset.Seconds())
	e.gauge("verve_redis_up", "1 if Redis works, else 0; /readyz has the reason.", flag(g.Away == ""))
	e.gauge("verve_redis_pending_ids", "Ids waiting for an answer from Redis.", float64(g.Pending))
	e.counter("verve_redis_batches_total", "Batches sent to Redis, empty ones and further attempts included.", g.Batches)
	e.counter("verve_redis_failures_total", "Attempts that failed, of all batches.", g.Retries)
	e.counter("verve_redis_ids_taken_back_total", "Ids removed from Redis because their requests had already been answered 503.", g.TakenBack)
	e.counter("verve_redis_ids_given_twice_total", "Ids that were in Redis already when an instance added them again: more than one instance may have answered ok.", g.Twice)
	e.counter("verve_redis_ids_replayed_total", "Ids answered ok that were added to Redis later: after it had lost them, or as it was unreachable.", g.Restored)
	e.counter("verve_redis_ids_dropped_total", "Ids answered with ok that are in no record, because the window was sealed without them.", g.Dropped)
}

// processHelp has the families of the process and the Go runtime that are written, with
// the names that they have in Prometheus' own clients.
var processHelp = map[string]struct{ kind, help string }{
	"go_gc_cpu_seconds_total":                       {"counter", "CPU time of the garbage collector."},
	"go_gc_duration_seconds":                        {"summary", "Pauses caused by the garbage collector."},
	"go_gomaxprocs":                                 {"gauge", "Number of threads that may run Go code at the same time."},
	"go_goroutines":                                 {"gauge", "Number of goroutines."},
	"go_memlimit_bytes":                             {"gauge", "Soft memory limit of the Go runtime."},
	"go_memstats_alloc_bytes":                       {"gauge", "Heap in use."},
	"go_memstats_alloc_bytes_total":                 {"counter", "Bytes allocated on the heap."},
	"go_memstats_heap_objects":                      {"gauge", "Objects on the heap."},
	"go_memstats_mallocs_total":                     {"counter", "Objects allocated on the heap."},
	"go_memstats_next_gc_bytes":                     {"gauge", "Heap size at which the next garbage collection starts."},
	"go_memstats_sys_bytes":                         {"gauge", "Memory obtained from the operating system."},
	"go_sched_latencies_seconds":                    {"histogram", "Time that goroutines waited to run."},
	"go_threads":                                    {"gauge", "Number of operating system threads."},
	"process_cpu_seconds_total":                     {"counter", "CPU time, user and system."},
	"process_io_storage_read_bytes_total":           {"counter", "Bytes read from storage."},
	"process_io_storage_written_bytes_total":        {"counter", "Bytes written to storage."},
	"process_major_pagefaults_total":                {"counter", "Page faults that read from storage."},
	"process_max_fds":                               {"gauge", "Limit on open file descriptors."},
	"process_open_fds":                              {"gauge", "Open file descriptors."},
	"process_pressure_cpu_waiting_seconds_total":    {"counter", "Time during which a task of the container waited for a CPU."},
	"process_pressure_io_waiting_seconds_total":     {"counter", "Time during which a task of the container waited for storage."},
	"process_pressure_memory_waiting_seconds_total": {"counter", "Time during which a task of the container waited for memory."},
	"process_resident_memory_anon_bytes":            {"gauge", "Resident memory that is not backed by files."},
	"process_resident_memory_bytes":                 {"gauge", "Resident memory."},
	"process_start_time_seconds":                    {"gauge", "Start time of the process, Unix time."},
	"process_virtual_memory_bytes":                  {"gauge", "Virtual memory."},
}

// series matches the beginning of a line of a family.
var series = regexp.MustCompile(`^(\w+?)(_bucket|_sum|_count)?[{ ]`)

// writeProcess writes the families of processHelp. The library has others, but with names
// and types that the conventions of Prometheus do not allow.
func writeProcess(w io.Writer) {
	var all bytes.Buffer
	metrics.WriteProcessMetrics(&all)
	metrics.WriteFDMetrics(&all)
	last := ""
	for line := range bytes.Lines(all.Bytes()) {
		m := series.FindSubmatch(line)
		if m == nil {
			continue
		}
		family := string(m[1])
		about, known := processHelp[family]
		if known && family != last {
			exposition{w}.family(family, about.kind, about.help)
			last = family
		}
		if known {
			_, _ = w.Write(line)
		}
	}
}

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// age is how long ago t was, in seconds; 0 for the zero time.
func age(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return max(0, time.Since(t).Seconds())
}
