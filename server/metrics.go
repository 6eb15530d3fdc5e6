package server

import (
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// writeMetrics writes all metrics as Prometheus text. It alone knows their
// names, and no label ever comes from a caller.
func (a *Admin) writeMetrics(w io.Writer) {
	s, c := a.server, a.server.cfg.Counter.Stats()
	counter := metrics.WriteCounterUint64
	gauge := metrics.WriteGaugeUint64
	refused := func(r reason) uint64 { return s.refused[r.index].Load() }

	for _, m := range []struct {
		result string
		n      uint64
	}{
		{"ok", c.Unique},
		{"duplicate", c.Repeats},
		{"bad_id", refused(reasonBadID)},
		{"bad_endpoint", refused(reasonBadEndpoint)},
		{"unavailable", refused(reasonUnavailable)},
		{"full", refused(reasonFull)},
		{"busy", refused(reasonBusy)},
		{"draining", refused(reasonDraining)},
	} {
		counter(w, fmt.Sprintf("verve_accept_total{result=%q}", m.result), m.n)
	}
	for _, m := range []struct {
		reason string
		n      uint64
	}{
		{"bad_request", refused(reasonBadRequest)},
		{"method", refused(reasonMethod)},
		{"not_found", refused(reasonNotFound)},
		{"too_large", refused(reasonTooLarge)},
		{"too_slow", refused(reasonTooSlow)},
		{"panic", refused(reasonPanic)},
	} {
		counter(w, fmt.Sprintf("verve_http_refused_total{reason=%q}", m.reason), m.n)
	}

	_, live := s.cfg.Counter.Live()
	gauge(w, "verve_unique_ids", live)
	gauge(w, "verve_epochs_unclosed", uint64(c.Unclosed))
	counter(w, "verve_epochs_skipped_total", c.Skipped)

	metrics.WriteGaugeFloat64(w, "verve_clock_behind_seconds", c.Clock.Behind.Seconds())
	counter(w, `verve_clock_steps_total{direction="forward"}`, c.Clock.Forward)
	counter(w, `verve_clock_steps_total{direction="back"}`, c.Clock.Back)
	counter(w, "verve_process_pauses_total", c.Clock.Pauses)
	metrics.WriteCounterFloat64(w, "verve_process_paused_seconds_total", c.Clock.Paused.Seconds())

	d := s.cfg.Set.Stats()
	gauge(w, "verve_dedup_bytes", d.Bytes)
	gauge(w, "verve_dedup_slots", d.Slots)
	gauge(w, "verve_dedup_levels", uint64(d.Levels))
	counter(w, "verve_dedup_grown_total", d.Grown)
	counter(w, "verve_dedup_resized_total", d.Resized)
	counter(w, "verve_dedup_reclaimed_total", d.Reclaimed)
	counter(w, "verve_dedup_full_total", d.Full)

	r := a.cfg.Records()
	counter(w, "verve_records_published_total", r.Published)
	gauge(w, "verve_records_pending", uint64(r.Pending))
	metrics.WriteGaugeFloat64(w, "verve_records_oldest_age_seconds", age(r.Oldest))
	gauge(w, "verve_records_poison", uint64(r.Poison))
	counter(w, "verve_records_conflicts_total", r.Conflicts)
	counter(w, "verve_spool_append_failures_total", r.AppendFailures)

	cb := s.callbacks.Stats()
	for _, m := range []struct {
		result string
		n      uint64
	}{
		{"delivered", cb.Delivered},
		{"merged", cb.Merged},
		{"dropped", cb.Dropped},
		{"status", cb.FailedStatus},
		{"redirect", cb.FailedRedirect},
		{"timeout", cb.FailedTimeout},
		{"resolve", cb.FailedResolve},
		{"connect", cb.FailedConnect},
		{"refused", cb.FailedRefused},
		{"answer", cb.FailedAnswer},
		{"breaker", cb.FailedBreaker},
		{"limited", cb.FailedLimited},
	} {
		counter(w, fmt.Sprintf("verve_callbacks_total{result=%q}", m.result), m.n)
	}
	counter(w, "verve_callbacks_retried_total", cb.Retried)
	counter(w, "verve_callbacks_deferred_total", cb.Deferred)
	gauge(w, "verve_callbacks_waiting", uint64(cb.Waiting))
	gauge(w, "verve_callbacks_in_flight", uint64(cb.InFlight))
	gauge(w, "verve_callback_destinations", uint64(cb.Destinations))
	gauge(w, "verve_callback_breakers_open", uint64(cb.BreakersOpen))

	gauge(w, "verve_connections", uint64(s.ln.open()))
	counter(w, `verve_connections_rejected_total{limit="all"}`, s.ln.rejected.Load())
	counter(w, `verve_connections_rejected_total{limit="address"}`, s.ln.rejectedAddr.Load())
	counter(w, `verve_connections_ended_total{reason="slow"}`, s.ln.slowClosed.Load())
	counter(w, `verve_connections_ended_total{reason="idle"}`, s.ln.idleClosed.Load())
	counter(w, "verve_test_posts_total", s.sunk.Load())
	if cert := s.cfg.TLS; cert != nil {
		counter(w, "verve_tls_handshake_failures_total", s.ln.badHandshakes.Load())
		counter(w, "verve_tls_reload_failures_total", cert.failures.Load())
		gauge(w, "verve_tls_certificate_not_after_seconds", uint64(cert.notAfter().Unix()))
	}

	gauge(w, fmt.Sprintf("verve_build_info{version=%q,go=%q}", a.cfg.Version, runtime.Version()), 1)
	metrics.WriteProcessMetrics(w)
}

// age is how long ago t was, in seconds; 0 for the zero time.
func age(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return max(0, time.Since(t).Seconds())
}
