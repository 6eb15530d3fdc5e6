// Verve counts unique ids per minute, exactly.
//
// This file starts the parts of the server in one order and stops them in another. The settings
// are in config.go, and DESIGN.md follows the path of a request.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	stdlog "log"
	"math"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
	"verve/dedup"
	"verve/dedup/redis"
	"verve/internal/logline"
	"verve/server"
	"verve/server/callback"
	"verve/stream"
)

const (
	exitFailed = 1
	exitUsage  = 2

	// askGroup bounds how long the start waits for Redis to report the last window of the
	// group.
	askGroup = time.Second

	// signalEcho is how long after the first stopping signal a second one counts as the same.
	// It is longer than the time between two copies of one signal, and shorter than the time
	// between two presses of a key.
	signalEcho = 200 * time.Millisecond

	// stopGrace is how long a stop may take beyond --shutdown-timeout, to finish work such as a
	// commit at a broker that does not answer, or the closing of files. After that the process
	// exits, even if something hangs.
	stopGrace = 5 * time.Second

	// logPatience is how long an exit waits until the last lines of the log are written.
	logPatience = 500 * time.Millisecond
)

// version is set by the linker. If it is empty, versionText returns the version of the module.
var version = ""

func main() {
	// After a panic Go exits with code 2, which here means a bad setting: service managers do
	// not restart the process after it. With this setting a panic ends the process by SIGABRT.
	debug.SetTraceback("crash")
	err := run(os.Args[1:], os.Stdout, os.Stderr)
	if err == nil {
		return
	}
	last := logline.NewWriter(os.Stderr)
	fmt.Fprintf(last, "verve: %v\n", err)
	last.Flush(logPatience)
	if _, ok := errors.AsType[usageError](err); ok {
		os.Exit(exitUsage)
	}
	os.Exit(exitFailed)
}

func run(args []string, stdout, stderr *os.File) error {
	out := &output{file: stdout}
	cfg, command, err := parse(args, out)
	if out.err != nil || err != nil || cfg == nil { // --help
		return cmp.Or(out.err, err)
	}
	if cfg.PrintConfig {
		return cfg.print(out)
	}
	switch command {
	case "serve":
		log, lines := cfg.logger(stderr)
		defer lines.Flush(logPatience)
		return serve(cfg, log, lines)
	case "totals":
		return totals(cfg, out, stderr)
	case "healthcheck":
		return healthcheck(cfg.AdminListen)
	case "version":
		fmt.Fprintln(out, "verve", versionText())
	}
	return out.err
}

func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return strings.TrimPrefix(info.Main.Version, "v") // a release has no v, either
	}
	return "(devel)"
}

// serve runs the server until a signal or a failure.
func serve(cfg *config, log zerolog.Logger, lines *logline.Writer) error {
	logLibraries(log)

	p := &program{cfg: cfg, log: log, lines: lines, times: server.NewTimes(), failed: make(chan error, 8), notified: make(chan struct{})}
	// From here on a signal stops the server in order, even in the middle of the start.
	stop := p.catchSignals()
	defer p.close()
	if err := p.open(); err != nil {
		return err
	}
	p.run()
	greet(log, p.public.Addr(), p.private.Addr(), p.spool.Instance(), cfg)
	stopping := make(chan struct{})
	go notifySystemd(stopping, p.notified, log)
	debug.FreeOSMemory() // returns the half megabyte that was needed to read the settings, which is too little to start a collection

	var err error
	select {
	case <-stop:
		p.admin.NotReady()
		close(stopping)
		p.sendElsewhere()
	case err = <-p.failed:
		log.Error().Err(err).Msg("stopping after a failure")
		close(stopping)
		p.limitStop()
	}
	p.stop()
	select {
	case e := <-p.failed:
		err = errors.Join(err, e)
	default:
	}
	if err == nil {
		log.Info().Msg("stopped")
	}
	return err
}

// program is the parts of the server. open makes them in the order of the fields,
// run starts them, stop ends them, and close releases what open acquired.
type program struct {
	cfg   *config
	log   zerolog.Logger
	lines *logline.Writer // the queue that log writes to

	memory uint64 // how much memory the process may take, in bytes; 0: not known

	times       *server.Times
	public      net.Listener
	private     net.Listener // the admin listener
	handedOver  bool         // systemd holds the socket of public open, too
	certificate *server.Certificate
	spool       *stream.Spool
	shared      *redis.Set // the group's set; nil in memory mode
	stream      *stream.Stream
	group       *redis.Group // nil in memory mode
	set         dedup.Set    // shared, or one in memory
	use         lastUse
	counter     *counter.Counter
	earlier     counter.Published // in memory mode: the last window that earlier processes counted, with the ids that they have not published
	callbacks   *callback.Sender
	server      *server.Server
	admin       *server.Admin

	// A part that ends with an error sends it here; the first one stops the program.
	failed  chan error
	running sync.WaitGroup
	closed  chan struct{} // closed when the counter has published the last record

	notified chan struct{} // closed when systemd has been notified of the stop

	stopParts, stopCounter, stopCallbacks context.CancelFunc // stopParts is for all parts except the counter and the callbacks

	// unfinished names the step that the stop, or an interrupted start, is waiting for. If the
	// process has to exit without finishing it, the last log line names it.
	limited    sync.Once
	unfinished atomic.Value // string

	closers []func() // release what open acquired, in the order of acquiring
}

// open makes every part. If it returns an error, close releases what was made before that.
func (p *program) open() error {
	cfg, log := p.cfg, p.log
	p.memory = memoryLimit()
	limitGoMemory(p.memory)
	var err error
	if p.certificate, err = cfg.certificate(log); err != nil {
		return cfg.explain(err)
	}
	// The addresses come first: if a second server is started on this machine, it should fail
	// before it touches the data directory of the first.
	if err := p.listen(); err != nil {
		return err
	}
	if err := p.openRecords(); err != nil {
		return err
	}
	if err := p.openCounter(); err != nil {
		return err
	}
	callbacks := cfg.callbacks()
	callbacks.SelfAddr, callbacks.SelfPath, callbacks.AdminAddr = boundTo(p.public), server.SinkPath, boundTo(p.private)
	if p.certificate != nil {
		callbacks.SelfTLS = p.certificate.OwnConfig
	}
	callbacks.Descriptors = descriptorLimit()
	callbacks.Instance, callbacks.Live, callbacks.Took, callbacks.Log = p.spool.Instance(), p.live, p.times.CallbackEnded, log
	if p.callbacks, err = callback.New(callbacks); err != nil {
		return err
	}
	serverCfg := cfg.front()
	serverCfg.Counter, serverCfg.Set, serverCfg.Callbacks, serverCfg.TLS, serverCfg.Log = p.counter, p.set, p.callbacks, p.certificate, log
	serverCfg.Descriptors, serverCfg.Memory = descriptorLimit(), p.memory
	if p.server, err = server.New(serverCfg, p.public); err != nil {
		return err
	}
	p.openAdmin()
	return nil
}

// openAdmin makes the admin server: the live page, health checks and metrics.
func (p *program) openAdmin() {
	cfg := server.AdminConfig{
		Listener: p.private, Server: p.server, Times: p.times, Records: func() server.Records { return recordStats(p.stream.Stats()) }, Delivered: p.delivered,
		Group: p.cfg.Group, Instance: p.spool.Instance(), Version: versionText(), Token: string(p.cfg.adminToken), History: p.cfg.inDataDir("windows.jsonl"),
		LogDropped: p.lines.Dropped,
	}
	if p.shared != nil {
		cfg.Shared, cfg.Sealed = p.shared.Group, p.group.Sealed
	}
	if cfg.History != "" && p.stream.Stats().SetAside != "" {
		// The spool was damaged, so it is not known any more which windows in the history were
		// delivered.
		_ = os.Remove(cfg.History) // it may not exist
	}
	p.admin = server.NewAdmin(cfg)
}

// listen opens both addresses. For an address for which systemd hands over a socket, it uses
// that.
func (p *program) listen() error {
	sockets, err := handedOver()
	if err != nil {
		return usageError{err}
	}
	open := func(name, address string, to *net.Listener) (handed bool, err error) {
		if ln := sockets[name]; ln != nil {
			*to, handed = ln, true
		} else if *to, err = net.Listen("tcp", address); err != nil {
			return false, err
		}
		p.closers = append(p.closers, func() { _ = (*to).Close() })
		return handed, nil
	}
	if p.handedOver, err = open("public", p.cfg.Listen, &p.public); err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	if _, err = open("admin", p.cfg.AdminListen, &p.private); err != nil {
		return fmt.Errorf("--admin-listen: %w", err)
	}
	return nil
}

// boundTo returns the address of a listener, which must be a TCP listener.
func boundTo(ln net.Listener) netip.AddrPort { return ln.Addr().(*net.TCPAddr).AddrPort() }

// openRecords makes the spool, the group's set if there is one, and the stream of
// records into Kafka and the counts file.
func (p *program) openRecords() (err error) {
	cfg := p.cfg
	spool := cfg.spool()
	spool.Memory, spool.Log = p.memory, p.log
	if p.spool, err = stream.OpenSpool(spool); err != nil {
		return fmt.Errorf("--data-dir=%s: %w", cfg.DataDir, err)
	}
	p.closers = append(p.closers, func() { _ = p.spool.Close() })
	p.use.read(cfg.DataDir, cfg.ids(), p.log)
	streamCfg := stream.Config{Scope: stream.ScopeInstance, Kafka: cfg.kafka(), CountsFile: cfg.countsFile(), Log: p.log}
	if cfg.Dedup == dedupRedis {
		if p.shared, err = openShared(cfg, p.memory, p.spool.Instance(), p.log); err != nil {
			return err
		}
		p.closers = append(p.closers, func() { _ = p.shared.Close() })
		streamCfg.Scope, streamCfg.Claims = stream.ScopeGroup, p.shared.Ledger()
		if err := p.publishRecovered(streamCfg); err != nil {
			return err
		}
	}
	if p.stream, err = stream.New(streamCfg, p.spool); err != nil {
		return err
	}
	p.closers = append(p.closers, p.stream.Close)
	if p.shared != nil {
		p.group, err = redis.NewGroup(p.shared.Ledger(), p.stream, p.log)
	}
	return err
}

// leftWait bounds how long a start waits until the spool takes the counts that an earlier
// process left, for example because the disk is full.
const leftWait = 5 * time.Second

// publishRecovered publishes, as records of this instance, counts in the data directory that an
// earlier process made with --dedup=memory and could not publish.
func (p *program) publishRecovered(streamCfg stream.Config) error {
	streamCfg.Scope, streamCfg.Claims = stream.ScopeInstance, nil
	out, err := stream.New(streamCfg, p.spool)
	if err != nil {
		return err
	}
	defer out.Close()
	ctx, cancel := context.WithTimeout(context.Background(), leftWait)
	defer cancel()
	left := p.kept(dedup.Config{})
	err = dedup.PublishRecovered(left, p.spool.Published(), p.logPast, func(c counter.Count) error {
		if err := out.Publish(ctx, c); err != nil {
			return fmt.Errorf("the window of %s with %d ids: %w", c.Start.Format(time.RFC3339Nano), c.Unique, err)
		}
		p.log.Info().Str("window_start", c.Start.Format(time.RFC3339Nano)).Uint64("unique", c.Unique).Bool("exact", c.Exact).
			Msg("a window counted before the change to --dedup=redis is published for this instance")
		return nil
	})
	if err != nil { // they stay in the data directory for a start with --dedup=memory
		p.log.Warn().Err(err).Str("dir", left.Dir).Msg("ids counted before the change to --dedup=redis are not published")
	}
	return nil
}

// openCounter makes the counter and, in memory mode, the set that it counts in.
func (p *program) openCounter() (err error) {
	counterCfg := counter.Config{
		Window: p.cfg.Window, MaxSkew: p.cfg.MaxClockSkew, MaxKeys: p.cfg.MaxKeys, KeyMemory: p.memory / keyShare,
		OnClock: p.clockChanged, OnPause: p.paused, OnClose: p.windowClosed,
	}
	if p.shared != nil {
		p.set, counterCfg.Publisher = p.shared, p.group
		// If Redis does not answer now, the heartbeat finds out later how long the windows of
		// the group are.
		ctx, cancel := context.WithTimeout(context.Background(), askGroup)
		defer cancel()
		last, err := p.shared.Ledger().Last(ctx)
		if err == nil && last.Window > 0 && last.Window != p.cfg.Window && !last.Start.After(time.Now()) {
			counterCfg.NotBefore, counterCfg.LastLen = last.Start, last.Window
		}
	} else {
		mem, err := p.openSet()
		if err != nil {
			return err
		}
		p.closers = append(p.closers, func() { _ = mem.Close() })
		published := p.spool.Published()
		counterCfg.NotBefore = counter.LastOf(published)
		counterCfg.Past = mem.Past(published)
		p.logPast(counterCfg.Past)
		p.earlier = published[p.spool.Identity()]
		p.set, counterCfg.Publisher = mem, p.stream
		if !mem.Keeps() {
			counterCfg.InexactBefore = time.Now()
			p.log.Info().Msg("ids are in memory only: the ids that an earlier process answered in this window are not known, so the record of this window gets exact:false")
		}
	}
	counterCfg.Store = p.set
	if p.use.Elsewhere.After(counterCfg.InexactBefore) {
		counterCfg.InexactBefore = p.use.Elsewhere
	}
	if p.counter, err = counter.New(counterCfg); err != nil {
		return err
	}
	p.use.begin(p.log)
	for _, l := range counterCfg.Past.Recovered {
		switch {
		case l.Start.Equal(p.earlier.Last):
			p.earlier.Unique += l.Unique
		case l.Start.After(p.earlier.Last):
			p.earlier.Last, p.earlier.Unique = l.Start, l.Unique
		}
	}
	if old, until, changes := p.counter.Change(); changes {
		p.log.Warn().Str("window", old.String()).Str("until", until.Format(time.RFC3339Nano)).Str("then", p.cfg.Window.String()).
			Msg("--window was changed: windows keep their previous length until the first window of the new length begins")
	}
	return nil
}

// logPast logs which counts of earlier processes are lost.
func (p *program) logPast(past counter.Past) {
	line := func(l counter.Recovered) *zerolog.Event {
		return p.log.Error().Str("window_start", l.Start.Format(time.RFC3339Nano)).Str("window", l.Window.String()).Uint64("unique", l.Unique)
	}
	for _, l := range past.Recovered {
		if l.NoKeys {
			line(l).Msg("the counts by key of ids that an earlier process left are lost with the spool: their record has no keys, and is not exact")
		}
	}
	for _, l := range past.Lost {
		line(l).Msg("no record can be made of a window that an earlier process left: this instance has published a later one")
	}
}

// live returns the start of the open window and how many ids it has: in a group those of all
// instances, otherwise also those that earlier processes counted in this window.
func (p *program) live() (start time.Time, unique uint64) {
	e := p.counter.Last()
	start, unique = e.Start(), e.Unique()
	if start.Equal(p.earlier.Last) {
		unique += p.earlier.Unique
	}
	if p.shared != nil {
		unique = max(unique, p.shared.Live(start))
	}
	return start, unique
}

// delivered returns the state of the record of a window; "" if that is not known.
func (p *program) delivered(start time.Time) string {
	state := p.spool.Delivered(start)
	if state == "" && p.shared != nil && p.shared.Ledger().IsDelivered(start) {
		state = stream.StateDelivered
	}
	return state
}

// run starts every part in a goroutine of its own.
func (p *program) run() {
	p.closed = make(chan struct{})
	var parts, counting, calling context.Context
	parts, p.stopParts = context.WithCancel(context.Background())
	counting, p.stopCounter = context.WithCancel(context.Background())
	calling, p.stopCallbacks = context.WithCancel(context.Background())
	p.start("stream", func() error { return p.stream.Run(parts) })
	if p.group != nil {
		p.start("group", func() error { return p.group.Run(parts) })
	}
	p.start("dedup", func() error { return p.set.Run(parts) })
	p.start("counter", func() error {
		defer close(p.closed)
		return p.counter.Run(counting)
	})
	p.start("callbacks", func() error { return p.callbacks.Run(calling) })
	p.start("admin", p.admin.Serve)
	if p.certificate != nil {
		p.start("certificate", func() error { return p.certificate.Run(parts) })
	}
	p.start("server", p.server.Serve)
}

// start runs a part in a goroutine. The first error that a part returns stops the program.
func (p *program) start(name string, part func() error) {
	p.running.Go(func() {
		if err := part(); err != nil {
			p.failed <- fmt.Errorf("%s: %w", name, err)
		}
	})
}

// stop ends the parts in order, within the shutdown timeout. A step that is not finished in
// time is logged; records that are not delivered stay in the spool.
func (p *program) stop() {
	budget, cancel := context.WithTimeout(context.Background(), p.cfg.ShutdownTimeout)
	defer cancel()
	half, cancelHalf := context.WithTimeout(budget, p.cfg.ShutdownTimeout/2)
	defer cancelHalf()

	steps := []struct {
		failed string // the log line if do returns an error
		do     func() error
	}{
		// Load balancers should send requests elsewhere before any is refused.
		{"/readyz was not changed in time", p.notReady},
		// Connections that are not accepted yet wait in the socket for the next process, which
		// can count their ids.
		{"the socket was not left in time", func() error { return p.leaveSocket(budget) }},
		// From here on ids are answered 503. So the last record has every id that was answered
		// ok.
		{"the counter was not sealed in time", func() error { p.counter.Seal(); return nil }},
		// Requests that were counted get their answers, and their callbacks are queued.
		{"requests not finished in time", func() error { return p.server.Shutdown(budget) }},
		// No request can add another callback. The second half of the time is for the records.
		{"callbacks not sent in time", func() error { return p.drainCallbacks(half) }},
		// All requests have left the sealed epoch. The counter publishes it as not complete.
		{"the last record could not be written in time", func() error { return p.awaitClosed(budget) }},
		// This instance has reported all its counts. Now the group need not wait for it any
		// more.
		{"this instance could not leave its group in order", func() error { return p.leaveGroup(budget) }},
		// Records that are not delivered in time stay in the spool for the next start.
		{"records not delivered in time", func() error { return p.flush(budget) }},
		// Otherwise the process could end before the goroutine that notifies systemd has run.
		{"systemd was not notified of the stop in time", func() error { return await(budget, p.notified) }},
		// The other parts have nothing left to do.
		{"when counting ended could not be noted in last-use.json", p.endParts},
		// Last, so that operators can watch the stop.
		{"admin requests not ended", func() error { return p.admin.Shutdown(budget) }},
	}
	for _, step := range steps {
		p.unfinished.Store(step.failed)
		if err := step.do(); err != nil {
			p.log.Warn().Err(err).Msg(step.failed)
		}
	}
	p.unfinished.Store("a part did not end in time")
	p.running.Wait()
}

// sendElsewhere waits for the shutdown delay. Ids are counted meanwhile, and every answer
// closes its connection. So load balancers notice that this instance is not ready before it
// refuses anything.
func (p *program) sendElsewhere() {
	p.server.LastAnswers()
	if p.cfg.ShutdownDelay > 0 {
		p.log.Info().Stringer("shutdown_delay", p.cfg.ShutdownDelay).Msg("not ready; counting on for the shutdown delay")
	}
	select {
	case <-time.After(p.cfg.ShutdownDelay):
	case err := <-p.failed:
		p.failed <- err // for serve
	}
}

// leaveSocket stops accepting connections if systemd holds the socket open: it stays open when
// this process has ended.
func (p *program) leaveSocket(ctx context.Context) error {
	if p.handedOver {
		p.server.StopAccepting(ctx)
	}
	return nil
}

func (p *program) notReady() error {
	p.admin.NotReady()
	if p.group != nil {
		p.group.Leaving()
	}
	return nil
}

func (p *program) drainCallbacks(ctx context.Context) error {
	dropped := p.callbacks.Drain(ctx)
	p.stopCallbacks()
	if dropped > 0 {
		return fmt.Errorf("%d dropped", dropped)
	}
	return nil
}

// awaitClosed waits until the last record is published or spooled.
func (p *program) awaitClosed(ctx context.Context) error {
	err := await(ctx, p.closed)
	if err != nil {
		p.stopCounter()
		<-p.closed
	}
	return err
}

// await waits until done is closed, or returns the error of ctx. If both have happened, it
// returns nil.
func await(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-done:
		return nil
	default:
		return ctx.Err()
	}
}

func (p *program) leaveGroup(ctx context.Context) error {
	if p.group == nil {
		return nil
	}
	return p.group.Leave(ctx)
}

// flush waits until every record is delivered, and then reports to the group which records are.
func (p *program) flush(ctx context.Context) error {
	err := p.stream.Flush(ctx)
	if err == nil && p.group != nil {
		err = p.group.ReportDelivered(ctx)
	}
	return err
}

func (p *program) endParts() error {
	p.stopParts()
	return p.use.end()
}

// close releases what open acquired, in reverse order. The errors of closing are
// ignored: the process ends, and everything that must last was synced before.
func (p *program) close() {
	for _, release := range slices.Backward(p.closers) {
		release()
	}
}

// clockChanged logs that the clock makes this instance not ready, or that the problem is over.
func (p *program) clockChanged(problem string) {
	if problem == "" {
		p.log.Info().Msg("the clock is in step with the open window again")
		return
	}
	p.log.Error().Str("problem", problem).Msg("not ready because of the clock; counting continues, and sealed windows stay sealed")
}

func (p *program) paused(absent time.Duration) {
	p.log.Warn().Int64("absent_ms", absent.Milliseconds()).
		Msg("the process did not run for a while (stopped, machine suspended, or no CPU): skipped windows are published with 0 and complete:false")
}

// windowClosed logs a closed epoch, and passes it to the metrics and the live page. Only
// Counter.Run calls it, and open has made the admin server before that runs.
func (p *program) windowClosed(c counter.Count, took time.Duration, err error) {
	p.times.EpochClosed(c, took)
	if err == nil {
		p.admin.WindowClosed(c)
	}
	waiting := p.stream.Stats().Pending
	if err == nil && p.shared == nil {
		waiting = max(0, waiting-1) // the record of this window has only just been spooled, and is no backlog
	}
	logWindow(p.log, c, took, waiting, p.shared != nil, err)
}

// The keys of unpublished windows may take one part in keyShare of the memory limit. With the
// counts and records that are made of them at a turn, they take several times as much.
const keyShare = 16

// kept adds to a Config where the last process left its ids.
func (p *program) kept(to dedup.Config) dedup.Config {
	to.Dir, to.Publisher, to.Window, to.Ran = p.cfg.epochsDir(), p.spool.Identity(), p.cfg.Window, p.use.ran
	to.OnSetAside = func(name string, reason error) {
		p.log.Error().Err(reason).Str("set_aside_as", name).
			Msg("the ids of the last process are damaged or missing: the windows that it has not published, and with --dedup=memory the open one, are counted without them and get exact:false")
	}
	return to
}

// openSet makes the set, with the ids that the last process left in the data directory. If the
// system cannot keep ids in files, openSet logs that and keeps them in memory only.
func (p *program) openSet() (*dedup.Memory, error) {
	cfg, log := p.cfg, p.log
	c := p.kept(cfg.memory(p.memory))
	c.MaxIDs = cfg.MaxIDs
	c.OnFailure = func(err error) {
		log.Error().Err(err).Msg("ids cannot be kept on disk: every id gets 503 until the disk accepts writes again and this window has been published")
	}
	c.OnRepair = func() { log.Info().Msg("ids are kept on disk again") }
	if cfg.ExpectIDs > 0 && cfg.IDFormat != "uint64" { // ids may be decimals, UUIDs or text
		c.Expect, c.ExpectAny = 0, cfg.ExpectIDs
	}
	set, err := dedup.NewMemory(c)
	if errors.Is(err, errors.ErrUnsupported) {
		log.Warn().Err(err).Msg("ids are kept in memory only: a crash loses the ids of the running window")
		c.Dir = ""
		set, err = dedup.NewMemory(c)
	}
	return set, err
}

// The values of --dedup: with dedupRedis all instances of a group count in one Redis.
const (
	dedupMemory = "memory"
	dedupRedis  = "redis"
)

// openShared makes the set that the group shares. This instance also remembers ids that Redis
// has, but only in memory and not on disk, because Redis keeps them.
func openShared(cfg *config, memory uint64, instance string, log zerolog.Logger) (*redis.Set, error) {
	local, err := dedup.NewMemory(cfg.memory(memory))
	if err != nil {
		return nil, err
	}
	c := cfg.redis()
	c.Instance, c.Local, c.File, c.Log = instance, local, cfg.inDataDir("group-answers.json"), log
	set, err := redis.New(c)
	if err != nil {
		_ = local.Close()
		return nil, err
	}
	return set, nil
}

// logLibraries turns what libraries print with Go's standard logger into lines of log.
func logLibraries(log zerolog.Logger) {
	stdlog.SetFlags(0)
	stdlog.SetOutput(log.With().Str("level", "warn").Logger())
}

// catchSignals handles each signal as actOf describes, until the process ends. It sends the
// first signal that stops the server to the returned channel. A second SIGTERM, SIGINT or
// SIGQUIT ends the process at once. A signal within signalEcho after the first counts as the
// same one, because timeout(1) and terminals send a signal to the process and to its process
// group.
func (p *program) catchSignals() (stop <-chan os.Signal) {
	signals, first := make(chan os.Signal, 64), make(chan os.Signal, 1)
	notifySignals(signals)
	go func() {
		stopping := false
		var asked time.Time // when the first SIGTERM, SIGINT or SIGQUIT arrived
		for s := range signals {
			act := actOf(s)
			if act.dump {
				p.dump(act.name)
			}
			if !act.stop {
				p.log.Info().Str("signal", act.name).Msg("the signal is ignored")
				continue
			}
			if !stopping {
				stopping = true
				p.log.Info().Str("signal", act.name).Msg("stopping")
				p.limitStop()
				first <- s
			}
			switch {
			case !act.insist:
			case asked.IsZero():
				asked = time.Now()
			case time.Since(asked) >= signalEcho:
				p.log.Warn().Str("signal", act.name).Msg("second signal: stopping at once")
				p.exit()
			}
		}
	}()
	return first
}

// limitStop ends the process if the stop, or a start that a signal has interrupted, takes too
// long: calls to a file system that hangs have no timeout.
func (p *program) limitStop() {
	p.limited.Do(func() {
		p.unfinished.CompareAndSwap(nil, "the start was not finished in time")
		time.AfterFunc(p.cfg.ShutdownDelay+p.cfg.ShutdownTimeout+stopGrace, func() {
			p.log.Error().Any("unfinished", p.unfinished.Load()).
				Msg("the stop took longer than --shutdown-timeout: exiting now; what is on disk is published at the next start")
			p.exit()
		})
	})
}

// exit ends the process at once. It only waits for the log, for logPatience at most.
func (p *program) exit() {
	p.lines.Flush(logPatience)
	os.Exit(exitFailed)
}

// dump logs the stacks of all goroutines.
func (p *program) dump(signal string) {
	const most = 1 << 20 // the stacks of some thousand goroutines
	text := make([]byte, most)
	p.log.Info().Str("signal", signal).Bytes(goroutinesField, text[:runtime.Stack(text, true)]).Msg("goroutines")
}

// greet logs the addresses, names and sinks of the server, and commands to try it.
func greet(log zerolog.Logger, public, admin net.Addr, instance string, cfg *config) {
	log.Info().Str("version", versionText()).Str("listen", public.String()).Str("admin", admin.String()).
		Str("group", cfg.Group).Str("instance", instance).Str("window", cfg.Window.String()).Str("records", cfg.recordsGo()).
		Msg("listening")
	if addr, ok := admin.(*net.TCPAddr); ok && !addr.IP.IsLoopback() && cfg.AdminTokenFile == "" {
		log.Warn().Str("admin", admin.String()).
			Msg("the admin listener is not on loopback and has no token: set --admin-token-file or restrict access to it")
	}
	for _, line := range cfg.doubtful() {
		log.Warn().Msg(line)
	}
	curl, url := "curl", "http://"+reachable(public.String())
	if cfg.TLSCertFile != "" {
		curl, url = "curl -k", "https://"+reachable(public.String()) // -k, because the certificate is not for this address
	}
	log.Info().Msgf("try: %s '%s/api/verve/accept?id=42'", curl, url)
	log.Info().Msgf("try: %s '%s/api/verve/accept?id=43&endpoint=%s/test'", curl, url, url)
	log.Info().Msgf("watch: http://%s/", reachable(admin.String()))
}

// recordsGo returns a text that names the sinks of the records.
func (c *config) recordsGo() string {
	var to []string
	if len(c.KafkaBrokers) > 0 {
		to = append(to, "topic "+c.KafkaTopic+" at "+strings.Join(c.KafkaBrokers, ","))
	}
	switch f := c.countsFile(); f {
	case "":
	case "-":
		to = append(to, "standard output")
	default:
		to = append(to, "counts file "+f)
	}
	if len(to) == 0 {
		return "nowhere: there are no brokers, and --counts-file is off"
	}
	return strings.Join(to, " and ")
}

// reachable returns the address with which a client on this machine reaches a listener.
func reachable(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return listen
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

// logWindow logs the line of a closed window: the counts, their rate, how long after the end of
// the window the last request left, how long the closer waited for that request and published
// the count, and how many records of earlier windows wait for delivery.
//
// In a group these are the counts of this instance. The count of the whole group is in a line
// of the instance that publishes it.
func logWindow(log zerolog.Logger, c counter.Count, took time.Duration, waiting int, shared bool, err error) {
	line := log.Info()
	if err != nil {
		line = log.Error().Err(err)
	}
	line = line.Str("window_start", c.Start.Format(time.RFC3339Nano)).
		Uint64("unique", c.Unique).Uint64("duplicates", c.Repeats).
		Float64("per_second", math.Round(float64(c.Unique+c.Repeats)/c.Window.Seconds()*10)/10).
		Bool("complete", c.Complete).Bool("exact", c.Exact).Int("earlier_pending", waiting)
	if c.Complete && !c.SealedAt.IsZero() {
		line = line.Dur("late_ms", c.SealedAt.Sub(c.Start.Add(c.Window)))
	}
	line = line.Dur("took_ms", took)
	if err != nil {
		line.Msg("window not published")
		return
	}
	if shared {
		line.Msg("window closed by this instance")
		return
	}
	line.Msg("window published")
}

func recordStats(s stream.Stats) server.Records {
	r := server.Records{
		Published: s.Published, Pending: s.Pending, Oldest: s.Oldest, Poison: s.DeadLetters,
		Conflicts: s.Conflicts, AppendFailures: s.AppendFailures, Blocked: s.AppendError,
	}
	for _, k := range s.Sinks {
		r.Sinks = append(r.Sinks, server.Sink(k))
	}
	return r
}
