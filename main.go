// Verve counts unique ids per minute, exactly.
//
// This file starts the parts in order and stops them in reverse; the settings
// are in config.go, and the way of a request is told in DESIGN.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
	"verve/dedup"
	"verve/server"
	"verve/stream"
)

const (
	exitFailed = 1
	exitUsage  = 2

	healthTimeout = 3 * time.Second

	// signalEcho is longer than one signal takes to arrive twice and shorter
	// than a hand takes to press a key twice.
	signalEcho = 200 * time.Millisecond
)

// version is set by the linker; else it is what the module system knows.
var version = ""

func main() {
	err := run(os.Args[1:], os.Stdout, os.Stderr)
	if err == nil {
		return
	}
	fmt.Fprintf(os.Stderr, "verve: %v\n", err)
	var usage usageError
	if errors.As(err, &usage) {
		os.Exit(exitUsage)
	}
	os.Exit(exitFailed)
}

func run(args []string, stdout, stderr *os.File) error {
	cfg, command, err := parse(args, stdout)
	if err != nil || cfg == nil { // --help
		return err
	}
	if cfg.PrintConfig {
		return cfg.print(stdout)
	}
	switch command {
	case "serve":
		return serve(cfg, cfg.logger(stderr))
	case "totals":
		return totals(cfg, stdout, stderr)
	case "healthcheck":
		return healthcheck(cfg.AdminListen)
	case "completion <shell>":
		writeCompletion(stdout, cfg.Completion.Shell, cfg.model)
	case "version":
		fmt.Fprintln(stdout, "verve", versionText())
	}
	return nil
}

func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// serve runs the server until a signal or a failure.
func serve(cfg *config, log zerolog.Logger) (err error) {
	// From here on a signal stops in order, also in the middle of the start.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	ignoreFileSize()

	secret, err := secretFile("callback-secret-file", cfg.CallbackSecretFile)
	if err != nil {
		return usageError{err}
	}
	token, err := secretFile("admin-token-file", cfg.AdminTokenFile)
	if err != nil {
		return usageError{err}
	}
	certificate, err := cfg.certificate(log)
	if err != nil {
		return usageError{err}
	}

	// Addresses first: a second server on this machine should fail before it
	// touches the data directory of the first.
	public, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	defer public.Close()
	adminLn, err := net.Listen("tcp", cfg.AdminListen)
	if err != nil {
		return fmt.Errorf("--admin-listen: %w", err)
	}
	defer adminLn.Close()

	spool, err := stream.OpenSpool(stream.SpoolConfig{
		Dir: cfg.spoolDir(), Group: cfg.Group, Instance: cfg.Instance, Log: log,
	})
	if err != nil {
		return err
	}
	defer spool.Close()
	to := stream.Config{Scope: stream.ScopeInstance, Kafka: cfg.kafka(), CountsFile: cfg.countsFile(), Log: log}
	var shared *dedup.Redis // the set, if it is the group's
	if cfg.Dedup == dedupRedis {
		if shared, err = openShared(cfg, spool.Instance(), log); err != nil {
			return err
		}
		defer shared.Close()
		to.Scope, to.Ledger = stream.ScopeGroup, shared.Ledger()
	}
	records, err := stream.New(to, spool)
	if err != nil {
		return usageError{err}
	}
	defer records.Close()

	counting := counter.Config{Window: cfg.Window, Publish: records, MaxSkew: cfg.MaxClockSkew}
	var set dedup.Set
	if shared != nil {
		set = shared
	} else {
		own, err := openSet(cfg, log)
		if err != nil {
			return err
		}
		defer own.Close()
		lastWindow, lastSum := spool.LastWindow()
		counting.NotBefore, counting.Past = lastWindow, own.Past(lastWindow, lastSum)
		set = own
	}
	var admin *server.Admin // there before the counter runs
	counting.Store = set
	counting.OnClock = func(problem string) { logClock(log, problem) }
	counting.OnPause = func(absent time.Duration) {
		log.Warn().Str("absent", absent.Round(time.Millisecond).String()).
			Msg("the process did not run: it was stopped, the machine suspended, or too busy; windows that passed are published empty and not complete")
	}
	counting.OnClose = func(c counter.Count, took time.Duration, err error) {
		admin.EpochClosed(c, took)
		logWindow(log, c, took, records.Stats().Pending, shared != nil, err)
	}
	count, err := counter.New(counting)
	if err != nil {
		return err
	}
	live, delivered := count.Live, records.Delivered
	var group func() dedup.GroupStats
	if shared != nil {
		group = shared.Group
		live = func() (time.Time, uint64) {
			start, here := count.Live()
			return start, max(here, shared.Live())
		}
		delivered = func(start time.Time) string {
			state := records.Delivered(start)
			if state == "" && shared.Ledger().IsDelivered(counter.Span{Start: start, Window: cfg.Window}) {
				state = stream.StateDelivered
			}
			return state
		}
	}
	callbacks, err := server.NewCallbacks(server.CallbackConfig{
		Allow: cfg.CallbackAllow, Concurrency: cfg.CallbackConcurrency, Rate: cfg.CallbackRate,
		Timeout: cfg.CallbackTimeout, Secret: secret,
		SelfAddrs: []string{public.Addr().String()}, SelfTLS: certificate, AdminAddr: adminLn.Addr().String(),
		Group: cfg.Group, Instance: spool.Instance(), Live: live, Log: log,
	})
	if err != nil {
		return usageError{err}
	}
	front, err := server.New(server.Config{
		Counter: count, Set: set, Callbacks: callbacks, Log: log,
		Uint64IDs: cfg.IDFormat == "uint64", DuplicateStatus: cfg.DuplicateStatus, WindowHeader: cfg.WindowHeader,
		MaxConns: cfg.MaxConns, MaxConnsPerAddress: cfg.MaxConnsPerAddress, TLS: certificate, SlowTimeout: cfg.SlowTimeout, IdleTimeout: cfg.IdleTimeout,
	}, public)
	if err != nil {
		return err
	}
	admin = server.NewAdmin(server.AdminConfig{
		Server: front, Records: func() server.Records { return recordStats(records.Stats()) }, Delivered: delivered, Shared: group,
		Group: cfg.Group, Instance: spool.Instance(), Version: versionText(), Token: string(token),
	})

	// Each part runs until its own stop; the first that fails stops all.
	failed := make(chan error, 8)
	var parts sync.WaitGroup
	start := func(name string, part func(context.Context) error) (stop context.CancelFunc) {
		ctx, cancel := context.WithCancel(context.Background())
		parts.Go(func() {
			if err := part(ctx); err != nil {
				failed <- fmt.Errorf("%s: %w", name, err)
			}
		})
		return cancel
	}
	stopStream := start("stream", records.Run)
	stopSet := start("dedup", set.Run)
	closed := make(chan struct{})
	stopCounter := start("counter", func(ctx context.Context) error {
		defer close(closed)
		return count.Run(ctx)
	})
	stopCallbacks := start("callbacks", callbacks.Run)
	start("admin", func(context.Context) error { return admin.Serve(adminLn) })
	stopCertificate := context.CancelFunc(func() {})
	if certificate != nil {
		stopCertificate = start("certificate", certificate.Run)
	}
	start("server", func(context.Context) error { return front.Serve() })

	greet(log, public.Addr(), adminLn.Addr(), spool.Instance(), cfg)
	select {
	case s := <-signals:
		admin.NotReady()
		log.Info().Str("signal", s.String()).Msg("stopping")
		go stopAtOnce(signals, time.Now(), log)
	case err = <-failed:
		log.Error().Err(err).Msg("stopping after a failure")
	}

	// Not ready, no more ids, answer what was counted, send what was promised,
	// publish, deliver. What cannot be done in time is said and kept or counted.
	budget, cancel := context.WithTimeout(context.Background(), cfg.ShutdownTimeout)
	defer cancel()
	admin.NotReady()
	records.Leaving()
	count.Seal()
	if err := front.Shutdown(budget); err != nil {
		log.Warn().Err(err).Msg("requests not finished in time")
	}
	half, cancelHalf := context.WithTimeout(budget, cfg.ShutdownTimeout/2)
	defer cancelHalf()
	if dropped := callbacks.Drain(half); dropped > 0 {
		log.Warn().Int("dropped", dropped).Msg("callbacks not sent in time")
	}
	stopCallbacks()
	select {
	case <-closed:
	case <-budget.Done():
		log.Error().Msg("the last record could not be written in time")
		stopCounter()
		<-closed
	}
	if err := records.Leave(budget); err != nil {
		log.Warn().Err(err).Msg("this instance could not leave its group in order")
	}
	if err := records.Flush(budget); err != nil {
		log.Warn().Err(err).Msg("records not delivered in time")
	}
	stopStream()
	stopSet()
	stopCertificate()
	if err := admin.Shutdown(budget); err != nil {
		log.Warn().Err(err).Msg("admin requests not finished in time")
	}
	parts.Wait()
	stopCounter()
	select {
	case e := <-failed:
		err = errors.Join(err, e)
	default:
	}
	if err == nil {
		log.Info().Msg("stopped")
	}
	return err
}

// openSet makes the set, with the ids that the last process left in the data
// directory. On a system that cannot keep them there it does without.
func openSet(cfg *config, log zerolog.Logger) (*dedup.Memory, error) {
	limit := tableBytes()
	c := dedup.Config{
		Expect: cfg.expectIDs(limit), MaxIDs: cfg.MaxIDs, MaxBytes: limit,
		CleanupInterval: cfg.CleanupInterval, CleanupBatch: cfg.CleanupBatch,
		Dir: cfg.epochsDir(),
		OnSetAside: func(name string, reason error) {
			log.Error().Err(reason).Str("set_aside_as", name).
				Msg("the ids of the last epoch were damaged and are set aside; the present window counts without them and is not exact")
		},
		OnFailure: func(err error) {
			log.Error().Err(err).Msg("ids cannot be kept on disk: every id is refused until the disk takes writes again, and the window is over and published")
		},
		OnRepair: func() { log.Info().Msg("ids are kept on disk again") },
	}
	set, err := dedup.NewMemory(c)
	if errors.Is(err, errors.ErrUnsupported) {
		log.Warn().Err(err).Msg("ids are kept in memory only: a crash forgets those of the running window")
		c.Dir = ""
		set, err = dedup.NewMemory(c)
	}
	return set, err
}

// dedupRedis as --dedup counts with the other instances of the group.
const dedupRedis = "redis"

// openShared makes the set that the group shares. What this instance has learnt
// of its ids stays in memory, as Redis keeps them.
func openShared(cfg *config, instance string, log zerolog.Logger) (*dedup.Redis, error) {
	limit := tableBytes()
	local, err := dedup.NewMemory(dedup.Config{
		Expect: cfg.expectIDs(limit), MaxBytes: limit,
		CleanupInterval: cfg.CleanupInterval, CleanupBatch: cfg.CleanupBatch,
	})
	if err != nil {
		return nil, err
	}
	set, err := dedup.NewRedis(dedup.RedisConfig{
		URLs: cfg.RedisURL, Group: cfg.Group, Instance: instance, Window: cfg.Window, MaxSkew: cfg.MaxClockSkew,
		Local: local, FailOpen: cfg.RedisFail == "open", MaxIDs: cfg.MaxIDs, Log: log,
	})
	if err != nil {
		_ = local.Close()
		return nil, usageError{fmt.Errorf("--redis-url: %w", err)}
	}
	return set, nil
}

// logClock says why this instance is not ready, and that it is again.
func logClock(log zerolog.Logger, problem string) {
	if problem == "" {
		log.Info().Msg("the clock agrees with the open window and runs evenly")
		return
	}
	log.Error().Str("problem", problem).Msg("not ready because of the clock; ids are counted on, once each, and no window is opened again")
}

// stopAtOnce ends the process at the second signal. What follows the first
// within signalEcho is the same one: timeout(1) and terminals send it to the
// process and to its group.
func stopAtOnce(signals <-chan os.Signal, first time.Time, log zerolog.Logger) {
	for s := range signals {
		if time.Since(first) < signalEcho {
			continue
		}
		log.Warn().Str("signal", s.String()).Msg("second signal: stopping at once")
		os.Exit(exitFailed)
	}
}

// greet says what runs where and how to try it.
func greet(log zerolog.Logger, public, admin net.Addr, instance string, cfg *config) {
	to := "counts file " + cfg.countsFile()
	if len(cfg.KafkaBrokers) > 0 {
		to = "topic " + cfg.KafkaTopic + " at " + strings.Join(cfg.KafkaBrokers, ",")
		if f := cfg.countsFile(); f != "" {
			to += " and counts file " + f
		}
	}
	log.Info().Str("version", versionText()).Str("listen", public.String()).Str("admin", admin.String()).
		Str("group", cfg.Group).Str("instance", instance).Str("window", cfg.Window.String()).Str("records", to).
		Msg("listening")
	if addr, ok := admin.(*net.TCPAddr); ok && !addr.IP.IsLoopback() && cfg.AdminTokenFile == "" {
		log.Warn().Str("admin", admin.String()).
			Msg("whoever reaches the admin listener can read metrics, profiles and counts: set --admin-token-file, or see to it that only friends reach it")
	}
	curl, url := "curl", "http://"+reachable(public)
	if cfg.TLSCertFile != "" {
		curl, url = "curl -k", "https://"+reachable(public) // the certificate is of another name
	}
	log.Info().Msgf("try: %s '%s/api/verve/accept?id=42'", curl, url)
	log.Info().Msgf("try: %s '%s/api/verve/accept?id=43&endpoint=%s/test'", curl, url, url)
	log.Info().Msgf("watch: http://%s/", reachable(admin))
}

// reachable is addr as a client on this machine would write it.
func reachable(addr net.Addr) string {
	host, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return addr.String()
	}
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

// logWindow is the line of a closed window: what was counted, at what rate, how
// late its last request left, and how long waiting for it and publishing took.
//
// What the group counted in it is in the line of the instance that publishes it.
func logWindow(log zerolog.Logger, c counter.Count, took time.Duration, pending int, shared bool, err error) {
	line := log.Info()
	if err != nil {
		line = log.Error().Err(err)
	}
	line = line.Str("window_start", c.Start.Format(time.RFC3339Nano)).
		Uint64("unique", c.Unique).Uint64("duplicates", c.Repeats).
		Float64("per_second", math.Round(float64(c.Unique+c.Repeats)/c.Window.Seconds()*10)/10).
		Bool("complete", c.Complete).Bool("exact", c.Exact).Int("pending", pending)
	if c.Complete && !c.SealedAt.IsZero() {
		line = line.Dur("late", c.SealedAt.Sub(c.Start.Add(c.Window)))
	}
	line = line.Dur("took", took)
	if err != nil {
		line.Msg("window not published")
		return
	}
	if shared {
		line.Msg("window closed here")
		return
	}
	line.Msg("window published")
}

func recordStats(s stream.Stats) server.Records {
	r := server.Records{
		Published: s.Published, Pending: s.Pending, Oldest: s.Oldest, Poison: s.Poison,
		Conflicts: s.Conflicts, AppendFailures: s.AppendFailures, Blocked: s.AppendError,
	}
	for _, k := range s.Sinks {
		sink := server.Sink{Name: k.Name}
		if k.State == stream.StateFailing {
			sink.Failing = k.LastError
		}
		r.Sinks = append(r.Sinks, sink)
	}
	return r
}

// healthcheck asks the admin listener whether the server is alive.
func healthcheck(adminListen string) error {
	host, port, err := net.SplitHostPort(adminListen)
	if err != nil {
		return usageError{fmt.Errorf("--admin-listen: %w", err)}
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	client := http.Client{Timeout: healthTimeout, Transport: &http.Transport{Proxy: nil}}
	resp, err := client.Get("http://" + net.JoinHostPort(host, port) + "/healthz")
	if err != nil {
		return fmt.Errorf("not alive: %w", err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<10)); err != nil {
		return fmt.Errorf("not alive: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("not alive: %s", resp.Status)
	}
	return nil
}
