package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/alecthomas/kong"
	"github.com/goccy/go-yaml"
	"github.com/mattn/go-isatty"
	"github.com/rs/zerolog"

	"verve/counter"
	"verve/dedup"
	"verve/server"
	"verve/stream"
)

// noDataDir as --data-dir keeps everything in memory.
const noDataDir = "none"

// config holds every setting and the command. The tags are the documentation
// that --help prints; the defaults are part of the contract.
type config struct {
	Config      string `help:"File of settings in YAML or JSON, keyed by flag names without the dashes." placeholder:"FILE" group:"General"`
	PrintConfig bool   `help:"Print the settings in force and where each comes from, as a --config file, and exit." group:"General"`

	Listen       string        `default:":8080" help:"Address of the public listener." group:"General"`
	AdminListen  string        `default:"127.0.0.1:8081" help:"Address of the admin listener: health, metrics, windows, profiles." group:"General"`
	Window       time.Duration `default:"1m" help:"Length of a window, 50ms to 1h." group:"General"`
	MaxClockSkew time.Duration `default:"2s" help:"How far the clock may be set, be behind the open window, or with --dedup=redis differ from other instances', before this instance is not ready. 0: it is not watched." group:"General"`
	Group        string        `default:"verve" help:"Name of the instances that count together." group:"General"`
	Instance     string        `placeholder:"NAME" help:"Name of this instance. Default: the one kept in the data directory, else the host name." group:"General"`
	DataDir      string        `default:"verve-data" help:"Directory for the spool and the counts file; none: nothing on disk." group:"General"`

	TLSCertFile    string `name:"tls-cert-file" help:"Certificate of the public listener, with its chain, in PEM; it is read again when it changes. Default: plain HTTP." placeholder:"FILE" group:"General"`
	TLSKeyFile     string `name:"tls-key-file" help:"Key of --tls-cert-file in PEM." placeholder:"FILE" group:"General"`
	AdminTokenFile string `help:"File that holds the bearer token which the admin listener asks for; probes of /healthz and /readyz need none. Default: nobody does." placeholder:"FILE" group:"General"`

	Dedup           string        `default:"memory" enum:"memory,redis" help:"Where ids are kept: ${enum}. With redis all instances of a group count together." group:"Ids"`
	IDFormat        string        `name:"id-format" default:"opaque" enum:"opaque,uint64" help:"What an id is: any text (opaque), or canonical decimals up to 2^64-1 only (uint64)." group:"Ids"`
	WindowHeader    bool          `help:"Say in each answer, as Verve-Window, the start of the window that the id was judged in." group:"Ids"`
	DuplicateStatus int           `default:"409" help:"Status of the answer to an id already seen." group:"Ids"`
	ExpectIDs       uint64        `name:"expect-ids" placeholder:"N" help:"Unique ids per window to make room for at the start. Default: learnt from the last windows." group:"Ids"`
	MaxIDs          uint64        `name:"max-ids" placeholder:"N" help:"Unique ids a window may hold; more are answered 503 full. Default: what fits half of the memory limit." group:"Ids"`
	CleanupInterval time.Duration `default:"${cleanupInterval}" help:"Pause between two steps of reclaiming retired epochs." group:"Ids"`
	CleanupBatch    int           `default:"${cleanupBatch}" help:"Slots looked at in one step of reclaiming." group:"Ids"`

	RedisURL  []string `name:"redis-url" default:"redis://127.0.0.1:6379" help:"Redis of the group: redis://USER:PASSWORD@HOST:PORT/DB, rediss:// for TLS, redis-sentinel://HOST:PORT?master_set=NAME. Repeatable: nodes of a cluster, or Sentinels." placeholder:"URL" group:"Ids"`
	RedisFail string   `default:"closed" enum:"closed,open" help:"What becomes of ids while Redis is away: 503 (closed), or this instance decides alone, and the record says so where that shows (open)." group:"Ids"`

	KafkaBrokers      []string `help:"Brokers to send the records to, HOST:PORT,... Default: none, the records go to the counts file." placeholder:"HOST:PORT" group:"Records"`
	KafkaTopic        string   `default:"verve.unique-ids" help:"Topic of the records." group:"Records"`
	KafkaTLS          bool     `name:"kafka-tls" help:"Connect to the brokers by TLS, checked against the system's roots." group:"Records"`
	KafkaSASL         string   `name:"kafka-sasl" placeholder:"MECHANISM" help:"PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512. Default: no authentication." group:"Records"`
	KafkaUser         string   `placeholder:"NAME" help:"User for --kafka-sasl." group:"Records"`
	KafkaPasswordFile string   `help:"File that holds the password for --kafka-sasl." placeholder:"FILE" group:"Records"`
	CountsFile        string   `help:"File that records are appended to as JSON Lines, - for standard output, off. Default: counts.jsonl in the data directory without brokers, off with them." placeholder:"FILE" group:"Records"`

	CallbackAllow       []string      `help:"HOST:PORT or CIDR:PORT that callbacks may reach beside public addresses. Repeatable." placeholder:"HOST:PORT" group:"Callbacks"`
	CallbackConcurrency int           `default:"8" help:"POSTs in flight to one destination." group:"Callbacks"`
	CallbackRate        float64       `default:"50" help:"POSTs per second to a destination that is not allowed by name." group:"Callbacks"`
	CallbackTimeout     time.Duration `default:"5s" help:"Time for a whole exchange." group:"Callbacks"`
	CallbackSecretFile  string        `help:"File that holds the secret to sign callbacks by the Standard Webhooks scheme." placeholder:"FILE" group:"Callbacks"`

	MaxConns           int           `default:"${maxConns}" help:"Connections open at once; more are answered 503." group:"Limits"`
	MaxConnsPerAddress int           `default:"0" help:"Of them, those of one client address, for IPv6 of one /64 network; 0: no limit, as is right behind a load balancer." group:"Limits"`
	SlowTimeout        time.Duration `default:"${slowTimeout}" help:"Time for a request to arrive and for an answer to be taken." group:"Limits"`
	IdleTimeout        time.Duration `default:"${idleTimeout}" help:"Time between two requests of a connection." group:"Limits"`
	ShutdownDelay      time.Duration `default:"0s" help:"Time at a stop in which /readyz says no and ids are still counted, so that load balancers send requests elsewhere before any is refused. It comes before --shutdown-timeout." group:"Limits"`
	ShutdownTimeout    time.Duration `default:"10s" help:"Time to stop: answer requests, send callbacks, deliver records." group:"Limits"`

	LogLevel  string `default:"info" enum:"debug,info,warn,error" help:"Least level logged: ${enum}." group:"Log"`
	LogFormat string `default:"auto" enum:"auto,console,json" help:"console, json, or auto: console on a terminal, JSON elsewhere." group:"Log"`

	settings []setting         `kong:"-"` // of all of the above
	model    *kong.Application `kong:"-"`

	Serve       struct{}  `cmd:"" default:"withargs" help:"Run the server (the default)."`
	Totals      totalsCmd `cmd:"" help:"Print the total per window over all instances, from the topic or the counts file; name gaps and repeats."`
	Healthcheck struct{}  `cmd:"" help:"Exit 0 if the server on this machine is alive, else 1."`
	Version     struct{}  `cmd:"" help:"Print the version."`
	Completion  struct {
		Shell string `arg:"" enum:"bash,zsh,fish" help:"bash, zsh or fish."`
	} `cmd:"" help:"Print a script that completes commands and flags in a shell."`
}

type totalsCmd struct {
	Follow bool `help:"Go on with the records that come."`
}

// usageError is a mistake in the settings: exit code 2.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// parse reads the settings: flags over environment over --config file over
// defaults. It returns the command to run, or none after --help.
func parse(args []string, stdout io.Writer) (cfg *config, command string, err error) {
	cfg = new(config)
	helped := false
	file, err := readSettings(configPath(args))
	if err != nil {
		return nil, "", usageError{err}
	}
	k, err := kong.New(cfg,
		kong.Name("verve"),
		kong.Description(description),
		kong.Help(printHelp),
		kong.DefaultEnvars("VERVE"),
		kong.Writers(stdout, io.Discard),
		kong.Exit(func(int) { helped = true }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100}),
		kong.Resolvers(file),
		kong.Vars{
			"cleanupInterval": dedup.DefaultCleanupInterval.String(),
			"cleanupBatch":    fmt.Sprint(dedup.DefaultCleanupBatch),
			"maxConns":        fmt.Sprint(server.DefaultMaxConns),
			"slowTimeout":     server.DefaultSlowTimeout.String(),
			"idleTimeout":     server.DefaultIdleTimeout.String(),
		},
	)
	if err != nil {
		return nil, "", err // a mistake in the tags above
	}
	ctx, err := k.Parse(args)
	if helped {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", usageError{err}
	}
	if err := cfg.check(); err != nil {
		return nil, "", usageError{err}
	}
	cfg.settings, cfg.model = settings(k, ctx, file), k.Model
	return cfg, ctx.Command(), nil
}

// configPath finds the settings file before the other flags are read, as their
// values may come from it.
func configPath(args []string) string {
	path := os.Getenv("VERVE_CONFIG")
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, "--config="); ok {
			path = v
		} else if a == "--config" && i+1 < len(args) {
			path = args[i+1]
		}
	}
	return path
}

// settingsFile resolves flags from a YAML or JSON file.
type settingsFile struct {
	path   string
	values map[string]any
}

// readSettings reads the file at path; no path is a file without settings.
func readSettings(path string) (*settingsFile, error) {
	f := &settingsFile{path: path}
	if path == "" {
		return f, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("--config: %w", err)
	}
	if err := yaml.Unmarshal(b, &f.values); err != nil {
		first, _, _ := strings.Cut(err.Error(), "\n")
		return nil, fmt.Errorf("--config: %s: %s", path, first)
	}
	return f, nil
}

// Validate implements kong.Resolver: it refuses keys that are no flags.
func (f *settingsFile) Validate(app *kong.Application) error {
	known := map[string]bool{}
	for _, flag := range app.Flags {
		known[flag.Name] = true
	}
	for key := range f.values {
		if !known[key] || key == "config" || key == "help" {
			return fmt.Errorf("--config: %s: unknown key %q", f.path, key)
		}
	}
	return nil
}

// Resolve implements kong.Resolver. The environment, which kong would let the
// file override, goes before it.
func (f *settingsFile) Resolve(_ *kong.Context, _ *kong.Path, flag *kong.Flag) (any, error) {
	v, ok := f.values[flag.Name]
	if !ok {
		return nil, nil
	}
	if _, ok := fromEnvironment(flag); ok {
		return nil, nil
	}
	switch v := v.(type) {
	case []any:
		parts := make([]string, len(v))
		for i, p := range v {
			parts[i] = fmt.Sprint(p)
		}
		return strings.Join(parts, ","), nil
	case map[string]any, nil:
		return nil, errors.New("a single value is wanted")
	case float64:
		if v == math.Trunc(v) && math.Abs(v) < 1<<53 {
			return fmt.Sprint(int64(v)), nil
		}
	}
	return fmt.Sprint(v), nil
}

// fromEnvironment returns the variable that sets flag, if there is one.
func fromEnvironment(flag *kong.Flag) (name string, ok bool) {
	for _, env := range flag.Envs {
		if _, ok := os.LookupEnv(env); ok {
			return env, true
		}
	}
	return "", false
}

// setting is one flag with its value and where that comes from.
type setting struct {
	name   string
	value  reflect.Value
	source string
}

// settings lists those of the server, in the order of their declaration.
func settings(k *kong.Kong, ctx *kong.Context, file *settingsFile) (all []setting) {
	for _, flag := range k.Model.Flags {
		if flag.Name == "help" || flag.Name == "config" || flag.Name == "print-config" {
			continue
		}
		s := setting{flag.Name, flag.Target, "default"}
		if _, ok := file.values[flag.Name]; ok {
			s.source = file.path
		}
		if env, ok := fromEnvironment(flag); ok {
			s.source = env
		}
		if slices.ContainsFunc(ctx.Path, func(p *kong.Path) bool { return p.Flag == flag && !p.Resolved }) {
			s.source = "--" + flag.Name
		}
		all = append(all, s)
	}
	return all
}

// print writes the settings in force as a --config file; those that are empty,
// or hold a password, as comments. Other secrets are in files, which are named
// and not read.
func (c *config) print(w io.Writer) error {
	for _, s := range c.settings {
		value := s.value.Interface()
		shown := true
		switch v := value.(type) {
		case time.Duration:
			value = v.String()
		case string:
			hidden := withoutPassword(v)
			value, shown = hidden, v != "" && v == hidden
		case []string:
			list := make([]string, len(v)) // nil would be printed as null
			for i := range v {
				list[i] = withoutPassword(v[i])
			}
			value, shown = list, len(v) > 0 && slices.Equal(v, list)
		}
		b, err := yaml.MarshalWithOptions(value, yaml.Flow(true))
		if err != nil {
			return fmt.Errorf("--%s: %w", s.name, err)
		}
		line := fmt.Sprintf("%s: %s", s.name, strings.TrimSpace(string(b)))
		if !shown {
			line = "# " + line
		}
		if _, err := fmt.Fprintf(w, "%-45s # %s\n", line, s.source); err != nil {
			return err
		}
	}
	return nil
}

// userInfo is what stands before the host in a URL, however badly it is escaped.
var userInfo = regexp.MustCompile(`://.*@`)

// withoutPassword returns s without user and password, if it is a URL with some.
func withoutPassword(s string) string { return userInfo.ReplaceAllString(s, "://hidden@") }

// check refuses what the flags' types let through, and names the flag.
func (c *config) check() error {
	for _, f := range []struct {
		name string
		bad  bool
		want string
	}{
		{"window", c.Window < counter.MinWindow || c.Window > counter.MaxWindow, "50ms to 1h"},
		{"window", c.Window%time.Millisecond != 0, "whole milliseconds"},
		{"max-clock-skew", c.MaxClockSkew < 0, "a duration, or 0"},
		{"group", c.Group == "" || strings.Contains(c.Group, "/"), "a name without slashes"},
		{"instance", strings.Contains(c.Instance, "/"), "a name without slashes"},
		{"data-dir", c.DataDir == "", "a directory, or none"},
		{"duplicate-status", c.DuplicateStatus < 200 || c.DuplicateStatus > 599 || c.DuplicateStatus == 204 || c.DuplicateStatus == 205 || c.DuplicateStatus == 304, "an HTTP status with a body, 200 to 599"},
		{"cleanup-interval", c.CleanupInterval <= 0, "a duration above 0"},
		{"cleanup-batch", c.CleanupBatch <= 0, "a number above 0"},
		{"callback-concurrency", c.CallbackConcurrency <= 0, "a number above 0"},
		{"callback-rate", !(c.CallbackRate > 0), "a number above 0"},
		{"callback-timeout", c.CallbackTimeout <= 0, "a duration above 0"},
		{"max-conns", c.MaxConns <= 0, "a number above 0"},
		{"max-conns-per-address", c.MaxConnsPerAddress < 0, "a number, or 0 for no limit"},
		{"tls-key-file", c.TLSCertFile != "" && c.TLSKeyFile == "", "the key of --tls-cert-file"},
		{"tls-cert-file", c.TLSKeyFile != "" && c.TLSCertFile == "", "the certificate of --tls-key-file"},
		{"slow-timeout", c.SlowTimeout <= 0, "a duration above 0"},
		{"idle-timeout", c.IdleTimeout <= 0, "a duration above 0"},
		{"shutdown-delay", c.ShutdownDelay < 0, "a duration, or 0"},
		{"shutdown-timeout", c.ShutdownTimeout <= 0, "a duration above 0"},
		{"counts-file", c.CountsFile == "" && c.DataDir == noDataDir && len(c.KafkaBrokers) == 0, "a file, - or off, as there is neither a data directory nor a broker"},
	} {
		if f.bad {
			return fmt.Errorf("--%s: want %s, got %q", f.name, f.want, c.value(f.name))
		}
	}
	for _, f := range []struct{ name, addr string }{{"listen", c.Listen}, {"admin-listen", c.AdminListen}} {
		if _, _, err := net.SplitHostPort(f.addr); err != nil {
			return fmt.Errorf("--%s: %w", f.name, err)
		}
	}
	return nil
}

// value is the flag's value as text, for messages.
func (c *config) value(flag string) string {
	v := reflect.ValueOf(c).Elem()
	for i := range v.NumField() {
		if strings.EqualFold(v.Type().Field(i).Name, strings.ReplaceAll(flag, "-", "")) {
			return fmt.Sprint(v.Field(i).Interface())
		}
	}
	return ""
}

// spoolDir is the directory of the spool, empty for memory.
func (c *config) spoolDir() string {
	if c.DataDir == noDataDir {
		return ""
	}
	return c.DataDir
}

// epochsDir is where the ids of the running epoch are kept, empty for nowhere.
func (c *config) epochsDir() string {
	if c.DataDir == noDataDir {
		return ""
	}
	return filepath.Join(c.DataDir, "epochs")
}

// countsFile resolves the default, and off to the empty path.
func (c *config) countsFile() string {
	switch {
	case c.CountsFile == "off", c.CountsFile == "" && len(c.KafkaBrokers) > 0:
		return ""
	case c.CountsFile == "":
		return filepath.Join(c.DataDir, "counts.jsonl")
	}
	return c.CountsFile
}

func (c *config) kafka() stream.KafkaConfig {
	if len(c.KafkaBrokers) == 0 {
		return stream.KafkaConfig{}
	}
	k := stream.KafkaConfig{
		Brokers: c.KafkaBrokers, Topic: c.KafkaTopic,
		SASL: c.KafkaSASL, User: c.KafkaUser, PasswordFile: c.KafkaPasswordFile,
	}
	if c.KafkaTLS {
		k.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	return k
}

// secretFile reads the secret that a flag names the file of; none without one.
func secretFile(flag, path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("--%s: %w", flag, err)
	}
	if b = []byte(strings.TrimRight(string(b), "\r\n")); len(b) == 0 {
		return nil, fmt.Errorf("--%s: %s is empty", flag, path)
	}
	return b, nil
}

// certificate loads that of the public listener; nil: plain HTTP.
func (c *config) certificate(log zerolog.Logger) (*server.Certificate, error) {
	if c.TLSCertFile == "" {
		return nil, nil
	}
	cert, err := server.LoadCertificate(c.TLSCertFile, c.TLSKeyFile, log)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert-file: %w", err)
	}
	return cert, nil
}

// tableBytes is how much memory the ids may take: half of the limit set for
// the process (GOMEMLIMIT), its container, or the machine. The other half is for
// connections, the Go heap and, with a data directory, the page cache.
func tableBytes() uint64 {
	limit := uint64(math.MaxUint64)
	if n, err := memlimit.FromSystem(); err == nil {
		limit = n
	}
	if n, err := memlimit.FromCgroup(); err == nil {
		limit = min(limit, n)
	}
	if n := debug.SetMemoryLimit(-1); n < math.MaxInt64 {
		limit = min(limit, uint64(n))
	}
	if limit == math.MaxUint64 {
		return 0
	}
	return limit / 2
}

// expectIDs is the room for canonical decimals at the start. Where nothing is
// said it is what a busy server fills in its first window, unless memory is
// scarce: in a table that had to grow a new id is sought at every level, each a
// cache miss or two. What is not needed is given back after some windows.
func (c *config) expectIDs(tableBytes uint64) uint64 {
	const unsaid, bytesPerID, scarce = 8 << 20, 12, 32
	if c.ExpectIDs > 0 {
		return c.ExpectIDs
	}
	if tableBytes == 0 {
		return unsaid
	}
	return min(unsaid, tableBytes/bytesPerID/scarce)
}

// logger writes to w as the settings say.
func (c *config) logger(w *os.File) zerolog.Logger {
	level, err := zerolog.ParseLevel(c.LogLevel)
	if err != nil {
		level = zerolog.InfoLevel // cannot be: the flag is an enum
	}
	var out io.Writer = w
	if c.LogFormat == "console" || c.LogFormat == "auto" && isatty.IsTerminal(w.Fd()) {
		out = zerolog.ConsoleWriter{Out: w, TimeFormat: "15:04:05.000", NoColor: !isatty.IsTerminal(w.Fd())}
	}
	return zerolog.New(out).Level(level).With().Timestamp().Logger()
}
