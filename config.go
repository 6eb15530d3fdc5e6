package main

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/alecthomas/kong"
	"github.com/mattn/go-isatty"
	"github.com/rs/zerolog"

	"verve/counter"
	"verve/dedup"
	"verve/dedup/redis"
	"verve/internal/logline"
	"verve/internal/setting"
	"verve/server"
	"verve/server/callback"
	"verve/stream"
)

// noDataDir is the value of --data-dir with which everything is kept in memory.
const noDataDir = "none"

// config holds every setting and the command. --help prints the help texts in the tags. The
// defaults are part of the contract: changing one breaks users.
type config struct {
	Config      string `help:"Settings file in YAML or JSON; its keys are flag names without the dashes." placeholder:"FILE" group:"General"`
	PrintConfig bool   `help:"Print the settings in force and where each comes from, as a --config file, and exit." group:"General"`

	ShowVersion kong.VersionFlag `name:"version" short:"v" env:"-" help:"Print the version and exit." group:"General"`

	Listen       string        `default:":8080" help:"Address of the public listener." group:"General"`
	AdminListen  string        `default:"127.0.0.1:8081" help:"Address of the admin listener: live page, health, metrics, windows, profiles." group:"General"`
	Window       time.Duration `default:"1m" help:"Length of a window, 50ms to 1h." group:"General"`
	MaxClockSkew time.Duration `default:"2s" help:"Report not ready when the clock steps by more than this, is behind the open window by more, or (with --dedup=redis) differs from the clock of Redis by more. 0 turns off the checks of this machine's clock; with Redis, 2s is then the tolerance." group:"General"`
	Group        string        `default:"verve" help:"Name of the group of instances that this one belongs to." group:"General"`
	Instance     string        `placeholder:"NAME" help:"Name of this instance. Default: the one stored in the data directory, else the host name." group:"General"`
	DataDir      string        `default:"verve-data" help:"Directory for the ids of the running window, undelivered records and the counts file; none keeps nothing on disk, and needs brokers or --counts-file." group:"General"`

	TLSCertFile    string `name:"tls-cert-file" help:"Certificate of the public listener with its chain, in PEM; read again when it changes. Default: plain HTTP." placeholder:"FILE" group:"General"`
	TLSKeyFile     string `name:"tls-key-file" help:"Key of --tls-cert-file in PEM." placeholder:"FILE" group:"General"`
	AdminTokenFile string `help:"File with the bearer token required on the admin listener; /healthz and /readyz stay open. Default: no token required." placeholder:"FILE" group:"General"`

	Dedup           string        `default:"memory" enum:"memory,redis" help:"Where ids are stored: ${enum}. With redis all instances of a group count as one." group:"Ids"`
	IDFormat        string        `name:"id-format" default:"opaque" enum:"opaque,uint64" help:"What an id is: any text (opaque), or canonical decimals up to 2^64-1 only (uint64)." group:"Ids"`
	WindowHeader    bool          `help:"Add the header Verve-Window to each answer: the start of the window that the id was judged in." group:"Ids"`
	DuplicateStatus int           `default:"409" help:"HTTP status of the answer to an id already seen in the window." group:"Ids"`
	ExpectIDs       uint64        `name:"expect-ids" placeholder:"N" help:"Unique ids per window to reserve memory for at the start. Default: learnt from the last windows." group:"Ids"`
	MaxIDs          uint64        `name:"max-ids" placeholder:"N" help:"Maximum unique ids per window; further ids are answered 503 full. Default: as many as fit into half of the memory limit." group:"Ids"`
	CleanupInterval time.Duration `default:"${cleanupInterval}" help:"Pause between two steps of the cleaner, which frees what past windows left in the tables of ids." group:"Ids"`
	CleanupBatch    int           `default:"${cleanupBatch}" help:"Slots, each the room for one id, that the cleaner looks at in one step." group:"Ids"`

	RedisURL                  []string `name:"redis-url" default:"redis://127.0.0.1:6379" help:"Redis of the group: redis://USER:PASSWORD@HOST:PORT/DB, rediss:// for TLS, redis-sentinel://HOST:PORT?master_set=NAME. Repeatable: nodes of a cluster, or Sentinels." placeholder:"URL" group:"Ids"`
	RedisSentinelUser         string   `help:"User of the Sentinels, if it is not that of the Redis." placeholder:"NAME" group:"Ids"`
	RedisSentinelPasswordFile string   `help:"File with the password of the Sentinels, if it is not that of the Redis." placeholder:"FILE" group:"Ids"`

	RedisFail string `default:"closed" enum:"closed,open" help:"While Redis is unreachable: closed answers new ids 503; open lets each instance decide alone and marks the record exact:false if an id was answered ok twice." group:"Ids"`

	KafkaBrokers      []string `help:"Kafka brokers for the records, HOST:PORT,... Default: none; records go to the counts file." placeholder:"HOST:PORT" group:"Records"`
	KafkaTopic        string   `default:"verve.unique-ids" help:"Kafka topic of the records." group:"Records"`
	KafkaKeysTopic    string   `default:"${keysTopic}" help:"Kafka topic of the records by key." group:"Records"`
	KafkaTLS          bool     `name:"kafka-tls" help:"Connect to the brokers with TLS; their certificates are checked against the system's roots." group:"Records"`
	KafkaSASL         string   `name:"kafka-sasl" placeholder:"MECHANISM" help:"PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512. Default: no authentication." group:"Records"`
	KafkaUser         string   `placeholder:"NAME" help:"User for --kafka-sasl." group:"Records"`
	KafkaPasswordFile string   `help:"File with the password for --kafka-sasl." placeholder:"FILE" group:"Records"`
	CountsFile        string   `help:"File that records are appended to as JSON Lines; - for standard output; off for none. Default: counts.jsonl in the data directory without brokers, off with them." placeholder:"FILE" group:"Records"`

	CallbackAllow       []string      `help:"HOST:PORT or CIDR:PORT that callbacks may reach in addition to public addresses. Repeatable." placeholder:"HOST:PORT" group:"Callbacks"`
	CallbackConcurrency int           `default:"8" help:"Maximum POSTs in flight to one destination." group:"Callbacks"`
	CallbackRate        float64       `default:"50" help:"Maximum POSTs per second to a destination that --callback-allow does not list." group:"Callbacks"`
	CallbackTimeout     time.Duration `default:"5s" help:"Time limit of one POST, from dialling to the end of the answer." group:"Callbacks"`
	CallbackSecretFile  string        `help:"File with the secret that signs callbacks by the Standard Webhooks scheme: 24 to 64 bytes in base64, with or without the prefix whsec_." placeholder:"FILE" group:"Callbacks"`

	MaxConns           int           `placeholder:"N" help:"Maximum open connections; further ones are answered 503. Default: what the limits of descriptors and memory allow, at most ${maxConns}." group:"Limits"`
	MaxConnsPerAddress int           `default:"0" help:"Maximum open connections per client address (per /64 for IPv6). 0 means no limit; leave it at 0 behind a load balancer." group:"Limits"`
	MaxBatchIDs        int           `name:"max-batch-ids" default:"${maxBatchIDs}" help:"Maximum ids in one batch; a larger batch is answered 413." group:"Limits"`
	MaxBatchBytes      int           `default:"${maxBatchBytes}" help:"Maximum bytes of one batch, after decompression." group:"Limits"`
	MaxKeys            int           `default:"${maxKeys}" help:"Maximum keys in one window; an id under a further key is answered 503." group:"Limits"`
	CORSOrigin         []string      `name:"cors-origin" help:"Origin whose web pages may read answers, such as https://example.com, or *. Repeatable. A page may send ids without it." placeholder:"ORIGIN" group:"Limits"`
	SlowTimeout        time.Duration `default:"${slowTimeout}" help:"Maximum time to receive a request or to send an answer." group:"Limits"`
	IdleTimeout        time.Duration `default:"${idleTimeout}" help:"Maximum time between two requests of a connection." group:"Limits"`
	ShutdownDelay      time.Duration `default:"0s" help:"Time at a stop in which /readyz answers 503 but ids are still counted, so that load balancers send requests elsewhere before any is refused. It precedes --shutdown-timeout." group:"Limits"`
	ShutdownTimeout    time.Duration `default:"10s" help:"Maximum time for a stop: answer requests, send callbacks, deliver records." group:"Limits"`

	LogLevel  string `default:"info" enum:"debug,info,warn,error" help:"Lowest level to log: ${enum}." group:"Log"`
	LogFormat string `default:"auto" enum:"auto,console,json" help:"console, json, or auto: console on a terminal, JSON elsewhere." group:"Log"`

	sources *setting.Sources  `kong:"-"` // where the values of all settings above come from
	model   *kong.Application `kong:"-"`

	callbackSecret, adminToken, sentinelPassword []byte // the contents of the secret files

	Serve       struct{}  `cmd:"" default:"withargs" help:"Run the server (the default)."`
	Totals      totalsCmd `cmd:"" help:"Print the total of each window over all instances, from the topic or the counts file; report gaps and repeats."`
	Healthcheck struct{}  `cmd:"" help:"Exit 0 if the server on this machine is alive, else 1."`
	Version     struct{}  `cmd:"" help:"Print the version."`
}

type totalsCmd struct {
	Follow bool   `help:"Keep running and print new records as they arrive."`
	ByKey  bool   `help:"Print the total of each key in each window, the largest first."`
	Since  string `placeholder:"TIME" help:"Only windows that start at this time or later: 2026-11-22T06:36:00Z, or 2h for two hours ago."`
}

// usageError is a mistake in the settings. It makes the program exit with code 2.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// parse reads the settings and checks them. A flag has precedence over the environment, that
// over the --config file, and that over the default. parse returns the command to run, or a nil
// cfg if --help or --version was given and printed. An error is one line that names the
// setting, its value and the source of the value. parse only reads files and resolves
// addresses: it writes nothing and does not listen.
func parse(args []string, stdout io.Writer) (cfg *config, command string, err error) {
	if len(args) > 0 && args[0] == "help" {
		args = append(slices.Clone(args[1:]), "--help")
	}
	cfg = new(config)
	done := false // --help or --version has printed
	k, err := kong.New(cfg,
		kong.Name("verve"),
		kong.Description(description),
		kong.Help(printHelp),
		kong.DefaultEnvars(strings.TrimSuffix(setting.Prefix, "_")),
		kong.Writers(stdout, io.Discard),
		kong.Exit(func(int) { done = true }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100}),
		kong.Resolvers(kong.ResolverFunc(cfg.resolve)),
		kong.Vars{
			"version":         "verve " + versionText(),
			"cleanupInterval": dedup.DefaultCleanupInterval.String(),
			"cleanupBatch":    fmt.Sprint(dedup.DefaultCleanupBatch),
			"maxConns":        fmt.Sprint(server.DefaultMaxConns),
			"maxKeys":         fmt.Sprint(counter.DefaultMaxKeys),
			"keysTopic":       stream.DefaultKeysTopic,
			"maxBatchIDs":     fmt.Sprint(server.DefaultMaxBatchIDs),
			"maxBatchBytes":   fmt.Sprint(server.DefaultMaxBatchBytes),
			"slowTimeout":     server.DefaultSlowTimeout.String(),
			"idleTimeout":     server.DefaultIdleTimeout.String(),
		},
	)
	if err != nil {
		return nil, "", err // a mistake in the tags above
	}
	k.Model.Name = "verve" // even if the executable file has another name
	cfg.model = k.Model
	cfg.sources = setting.New(args, os.Environ(), cfg.flags())
	fileErr := cfg.sources.ReadFile("config")
	ctx, err := k.Parse(args)
	if done {
		return nil, "", nil
	}
	if err == nil {
		command, _, _ = strings.Cut(ctx.Command(), " ")
		err = cfg.judge(command, fileErr)
	}
	if err != nil {
		return nil, "", cfg.explain(err)
	}
	return cfg, command, nil
}

// flags returns the flags of all commands in the form that setting.Sources needs. It removes
// their variables from kong's model: the sources read the environment, and kong only prints the
// names of the variables (printHelp).
func (c *config) flags() []setting.Flag {
	var all []setting.Flag
	add := func(flags []*kong.Flag, file bool) {
		for _, f := range flags {
			_, text := f.Target.Interface().(string)
			s := setting.Flag{Name: f.Name, Bool: f.IsBool(), List: f.IsSlice(), Text: text, File: file && len(f.Envs) > 0 && f.Name != "config"}
			if len(f.Envs) > 0 {
				s.Env = f.Envs[0]
			}
			f.Tag.Envs = nil
			all = append(all, s)
		}
	}
	add(c.model.Flags, true)
	for _, command := range c.model.Children {
		add(command.Flags, false)
	}
	return all
}

// resolve is a kong.Resolver: it adds the environment and the settings file to the command line
// as sources of a flag.
func (c *config) resolve(ctx *kong.Context, of *kong.Path, flag *kong.Flag) (any, error) {
	if of.Command == nil && !reads(ctx.Command(), flag.Name) {
		return nil, nil
	}
	if text, _, ok := c.sources.Lookup(flag.Name); ok {
		return text, nil
	}
	return nil, nil
}

// judge returns an error if one of the settings that the command reads cannot work. fileErr is
// the error of reading the settings file.
func (c *config) judge(command string, fileErr error) error {
	if !reads(command, "config") {
		return nil
	}
	if fileErr != nil {
		return fileErr
	}
	if err := cmp.Or(c.sources.CheckVariables(), c.sources.CheckText()); err != nil {
		return err
	}
	for _, list := range []*[]string{&c.RedisURL, &c.KafkaBrokers, &c.CallbackAllow, &c.CORSOrigin} {
		for i, element := range *list {
			(*list)[i] = strings.TrimSpace(element)
		}
	}
	switch command {
	case "healthcheck":
		return checkAddress("admin-listen", c.AdminListen)
	case "totals":
		_, err := c.Totals.start(time.Time{})
		return cmp.Or(err, c.checkKafka())
	}
	return c.check()
}

// explain turns an error into a usageError of one line, with the setting that it is about, its
// value and the source of the value.
func (c *config) explain(err error) error {
	why := withoutPassword(err.Error())
	name := ""
	if bad, ok := errors.AsType[*setting.Error](err); ok {
		name, why = bad.Name, bad.Why
	} else if m := regexp.MustCompile(`^--([a-z0-9-]+)(:| must)`).FindStringSubmatch(why); m != nil {
		name, why = m[1], "want "+c.wanted(m[1]) // kong could not parse the value
	} else if word, ok := strings.CutPrefix(why, "unexpected argument "); ok && !strings.Contains(word, ",") {
		var commands []string
		for _, command := range c.model.Children {
			commands = append(commands, command.Name)
		}
		why += cmp.Or(setting.Nearest(word, commands), ", the commands are "+strings.Join(commands, ", "))
	}
	if name != "" {
		text, from, ok := c.sources.Lookup(name)
		switch {
		case ok:
			why = fmt.Sprintf("--%s=%s (%s): %s", name, c.shown(name, text), from.Phrase, why)
		case from.Name == "--"+name:
			why = fmt.Sprintf("--%s (%s): the value is missing, %s", name, from.Phrase, why)
		case from.Name != "default": // the value is in the file, and is not text
			why = fmt.Sprintf("--%s (%s): %s", name, from.Phrase, why)
		default:
			why = fmt.Sprintf("--%s=%s (%s): %s", name, c.shown(name, c.value(name)), from.Phrase, why)
		}
	}
	return usageError{errors.New(strings.Join(strings.FieldsFunc(why, unicode.IsControl), " "))} // one line
}

// wanted describes the values that the flag takes.
func (c *config) wanted(name string) string {
	flag := c.setting(name)
	if flag == nil {
		return "a value"
	}
	if flag.Enum != "" {
		return "one of " + strings.ReplaceAll(flag.Enum, ",", ", ")
	}
	switch v := flag.Target.Interface().(type) {
	case time.Duration:
		return "a duration such as 500ms, 90s or 1h30m"
	case uint64:
		return "a whole number, 0 or more"
	case int:
		return "a whole number"
	case float64:
		return "a number"
	case bool:
		return "true or false"
	case []string:
		return "a list with commas between its elements"
	default:
		return fmt.Sprintf("a %T", v)
	}
}

// Messages do not show the credentials in a value, nor a secret that was given instead of the
// name of its file.
var (
	credentials = regexp.MustCompile(`^(.*?://)?.*@`)
	secretFiles = []string{"admin-token-file", "callback-secret-file", "kafka-password-file", "redis-sentinel-password-file"}
)

// shown returns a value in the form in which a message may show it.
func (c *config) shown(name, value string) string {
	const longest = 200
	looksLikePath := strings.HasPrefix(value, "/") || strings.Contains(value, ".") || len(value) < 16
	switch {
	case slices.Contains(secretFiles, name) && (strings.HasPrefix(value, "whsec_") || !looksLikePath):
		return "(not shown, as it may be the secret itself)"
	case slices.Contains([]string{"redis-url", "kafka-brokers", "callback-allow", "listen", "admin-listen"}, name):
		value = credentials.ReplaceAllString(value, "${1}hidden@")
	}
	if len(value) > longest {
		value = value[:longest] + "..."
	}
	return strconv.Quote(value)
}

// settings lists the flags that are settings of the server, in the order of their
// declaration.
func (c *config) settings() (all []*kong.Flag) {
	for _, flag := range c.model.Flags {
		if !slices.Contains([]string{"help", "version", "config", "print-config"}, flag.Name) {
			all = append(all, flag)
		}
	}
	return all
}

// setting returns one of the settings; nil if there is none of that name.
func (c *config) setting(name string) *kong.Flag {
	for _, flag := range c.settings() {
		if flag.Name == name {
			return flag
		}
	}
	return nil
}

// value returns the value in force as text; empty if there is no such setting.
func (c *config) value(name string) string {
	flag := c.setting(name)
	if flag == nil {
		return ""
	}
	if list, ok := flag.Target.Interface().([]string); ok {
		return strings.Join(list, ",")
	}
	return fmt.Sprint(flag.Target.Interface())
}

// print writes the settings in force as a --config file. Settings that are empty or have a
// password become comments. Other secrets are in files: print writes only the names of these.
func (c *config) print(w io.Writer) error {
	for _, flag := range c.settings() {
		_, source, _ := c.sources.Lookup(flag.Name)
		value := flag.Target.Interface()
		shown := true
		switch v := value.(type) {
		case time.Duration:
			value = v.String()
		case string:
			hidden := withoutPassword(v)
			value, shown = hidden, v != "" && v == hidden
		case []string:
			list := make([]string, len(v)) // not nil, which would be printed as null
			for i := range v {
				list[i] = withoutPassword(v[i])
			}
			value, shown = list, len(v) > 0 && slices.Equal(v, list)
		}
		b, err := json.Marshal(value) // YAML as well, whatever characters a text has
		if err != nil {
			return fmt.Errorf("--%s: %w", flag.Name, err)
		}
		line := fmt.Sprintf("%s: %s", flag.Name, b)
		if !shown {
			line = "# " + line
		}
		if _, err := fmt.Fprintf(w, "%-45s # %s\n", line, source.Name); err != nil {
			return err
		}
	}
	return nil
}

// userInfo matches the user and password before the host of a URL, even if they are not escaped
// correctly.
var userInfo = regexp.MustCompile(`://.*@`)

// withoutPassword returns s; if it is a URL with a user or password, without these.
func withoutPassword(s string) string { return userInfo.ReplaceAllString(s, "://hidden@") }

// check lets each package check its part of the settings, because the packages define the
// bounds. It also reads the secret files, and keeps their contents in c.
func (c *config) check() (err error) {
	for _, name := range []string{ // for the packages 0 means the default, which a user who sets 0 does not mean
		"duplicate-status", "cleanup-interval", "cleanup-batch", "callback-concurrency", "callback-rate", "callback-timeout",
		"max-batch-ids", "max-batch-bytes", "max-keys", "slow-timeout", "idle-timeout", "shutdown-timeout",
	} {
		if c.setting(name).Target.IsZero() {
			return setting.Errorf(name, "want more than 0")
		}
	}
	if err := cmp.Or(setting.CheckTimeout("shutdown-timeout", c.ShutdownTimeout), setting.CheckTimeout("shutdown-delay", c.ShutdownDelay)); err != nil {
		return err
	}
	if err := counter.CheckWindow(c.Window); err != nil {
		return setting.Errorf("window", "%v", err)
	}
	if err := counter.CheckMaxKeys(c.MaxKeys); err != nil {
		return setting.Errorf("max-keys", "%v", err)
	}
	if err := c.checkFiles(); err != nil {
		return err
	}
	if err := c.checkCountsFile(); err != nil {
		return err
	}
	redis, spool, records := c.redis(), c.spool(), stream.Config{CountsFile: c.countsFile()}
	memory, callbacks, front := c.memory(memoryLimit()), c.callbacks(), c.front()
	for _, part := range []interface{ Check() error }{&spool, &records, &memory, &redis, &callbacks, &front} {
		if err := part.Check(); err != nil {
			return err
		}
	}
	if err := c.checkKafka(); err != nil {
		return err
	}
	return c.checkAddresses()
}

// checkKafka checks the settings for Kafka, even if there are no brokers. It is a function of
// its own because verve totals reads these settings, too.
func (c *config) checkKafka() error {
	k := c.kafka()
	return k.Check()
}

// namedFile is a file that is read because a setting names it.
type namedFile struct {
	flag, path string
	secret     *[]byte // where its content is kept; nil: another part reads it
}

func (c *config) files() []namedFile {
	return []namedFile{
		{"config", c.Config, nil},
		{"tls-cert-file", c.TLSCertFile, nil},
		{"tls-key-file", c.TLSKeyFile, nil},
		{"admin-token-file", c.AdminTokenFile, &c.adminToken},
		{"callback-secret-file", c.CallbackSecretFile, &c.callbackSecret},
		{"kafka-password-file", c.KafkaPasswordFile, nil},
		{"redis-sentinel-password-file", c.RedisSentinelPasswordFile, &c.sentinelPassword},
	}
}

// checkFiles reads the files that settings name, and checks settings that depend on each other.
func (c *config) checkFiles() (err error) {
	switch {
	case c.TLSCertFile != "" && c.TLSKeyFile == "":
		return setting.Errorf("tls-cert-file", "--tls-key-file with its key is missing")
	case c.TLSKeyFile != "" && c.TLSCertFile == "":
		return setting.Errorf("tls-key-file", "--tls-cert-file with its certificate is missing")
	case c.CountsFile == "" && c.DataDir == noDataDir && len(c.KafkaBrokers) == 0:
		return setting.Errorf("data-dir", "there is neither a data directory nor a broker: set --counts-file to a file, to - or to off")
	case c.DataDir == "":
		return setting.Errorf("data-dir", "want a directory, or none")
	}
	if err := cmp.Or(checkPath("data-dir", c.DataDir), checkPath("counts-file", c.CountsFile)); err != nil {
		return err
	}
	if c.TLSCertFile != "" {
		if _, err := c.certificate(zerolog.Nop()); err != nil {
			return err
		}
	}
	for _, f := range c.files() {
		if f.secret == nil {
			continue
		}
		if *f.secret, err = secretFile(f.flag, f.path); err != nil {
			return err
		}
	}
	return server.CheckToken(c.adminToken)
}

// checkPath refuses a path that the user probably did not mean: the server would create it, and
// the user would not find what was written there.
func checkPath(name, path string) error {
	switch {
	case strings.TrimSpace(path) != path:
		return setting.Errorf(name, "there is space at its beginning or end")
	case len(path) > 1 && strings.Contains("\"'`", path[:1]) && path[len(path)-1] == path[0]:
		return setting.Errorf(name, "there are quotes around it: env files keep the quotes around a value")
	case path == "~" || strings.HasPrefix(path, "~/"):
		return setting.Errorf(name, "~ is not replaced by the home directory here: want the full path, or ./~")
	}
	return nil
}

// checkCountsFile refuses a counts file that has another purpose: records would destroy its
// content, or be lost with it.
func (c *config) checkCountsFile() error {
	records := stream.Config{CountsFile: c.countsFile()}
	for _, path := range records.CountsFiles() {
		if c.DataDir != noDataDir && within(c.DataDir, path) {
			return setting.Errorf("counts-file", "%s is --data-dir=%s, or a directory above it", path, c.DataDir)
		}
		for _, other := range c.files() {
			if other.path != "" && sameFile(path, other.path) {
				return setting.Errorf("counts-file", "it is the file that --%s names", other.flag)
			}
		}
		if c.DataDir == noDataDir {
			continue
		}
		inside := sameFile(filepath.Dir(path), c.DataDir)
		if inside && ownFile.MatchString(filepath.Base(path)) || sameFile(filepath.Dir(path), c.epochsDir()) || sameFile(filepath.Dir(path), c.inDataDir("spool-keys")) {
			return setting.Errorf("counts-file", "it is one of the files that the server keeps in --data-dir")
		}
	}
	return nil
}

// ownFile matches the names of all files that the server keeps in the data directory, except
// the counts file.
var ownFile = regexp.MustCompile(`^(spool(\.|-keys).*|epochs\b.*|windows\.jsonl.*|group-answers\.json.*|last-use\.json.*)$`)

// sameFile reports whether two paths lead to the same file, which need not exist.
func sameFile(a, b string) bool {
	first, err := os.Stat(a)
	second, errB := os.Stat(b)
	if err == nil && errB == nil {
		return os.SameFile(first, second)
	}
	a, err = filepath.Abs(a)
	b, errB = filepath.Abs(b)
	return err == nil && errB == nil && a == b
}

// within reports whether dir, which need not exist, is at or below path.
func within(dir, path string) bool {
	dir, err := filepath.Abs(dir)
	path, errB := filepath.Abs(path)
	if err != nil || errB != nil {
		return false
	}
	rest, err := filepath.Rel(path, dir)
	return err == nil && rest != ".." && !strings.HasPrefix(rest, "../")
}

// doubtful returns a line for each setting that works but is probably not what the user meant.
func (c *config) doubtful() (lines []string) {
	if len(c.KafkaBrokers) == 0 {
		for _, name := range []string{"kafka-topic", "kafka-keys-topic", "kafka-tls", "kafka-sasl"} {
			if _, from, ok := c.sources.Lookup(name); ok {
				lines = append(lines, fmt.Sprintf("--%s (%s) has no effect: there are no --kafka-brokers, and the records go to the counts file", name, from.Phrase))
			}
		}
	}
	if c.discards() {
		lines = append(lines, fmt.Sprintf("--counts-file=%s keeps no records: it is %s, or standard output that is closed", c.CountsFile, os.DevNull))
	}
	if len(c.KafkaBrokers) > 0 && strings.EqualFold(c.KafkaSASL, "PLAIN") && !c.KafkaTLS {
		lines = append(lines, "--kafka-sasl=PLAIN without --kafka-tls sends the password unencrypted")
	}
	return lines
}

// discards reports whether everything that is written to the counts file is lost. If standard
// output is closed, Go opens os.DevNull instead.
func (c *config) discards() bool {
	null, err := os.Stat(os.DevNull)
	if err != nil {
		return false
	}
	var to os.FileInfo
	if c.CountsFile == "-" {
		to, err = os.Stdout.Stat()
	} else {
		to, err = os.Stat(c.countsFile())
	}
	return err == nil && os.SameFile(null, to)
}

// checkAddresses refuses addresses on which the server can never listen. A port that is in use,
// or an address that the machine does not have yet, may work later; the start reports these.
func (c *config) checkAddresses() error {
	var public, admin *net.TCPAddr
	for _, f := range []struct {
		name, addr string
		resolved   **net.TCPAddr
	}{{"listen", c.Listen, &public}, {"admin-listen", c.AdminListen, &admin}} {
		if err := checkAddress(f.name, f.addr); err != nil {
			return err
		}
		if os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
			continue // systemd hands over sockets, so the addresses are not used
		}
		addr, err := net.ResolveTCPAddr("tcp", f.addr)
		if err != nil {
			return setting.Errorf(f.name, "the host has no address: %v", err)
		}
		*f.resolved = addr
	}
	if public == nil || public.Port == 0 || public.Port != admin.Port {
		return nil
	}
	// Both for 0.0.0.0 and for [::] Go listens on all interfaces, with IPv4 and IPv6.
	everywhere := func(a *net.TCPAddr) bool { return a.IP == nil || a.IP.IsUnspecified() }
	if public.IP.Equal(admin.IP) && public.Zone == admin.Zone || everywhere(public) || everywhere(admin) {
		return setting.Errorf("admin-listen", "the port is the same as in --listen=%s", c.Listen)
	}
	return nil
}

// checkAddress refuses a text that is not an address to listen on. It does not resolve names.
func checkAddress(name, addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || strings.ContainsAny(host, " \"'/") {
		return setting.Errorf(name, "want HOST:PORT or :PORT, an IPv6 address in brackets")
	}
	if _, err := net.LookupPort("tcp", port); err != nil || port == "" {
		return setting.Errorf(name, "want a port from 0 to 65535")
	}
	return nil
}

// inDataDir returns the path of a file in the data directory; empty if there is no data
// directory.
func (c *config) inDataDir(name string) string {
	if c.DataDir == noDataDir {
		return ""
	}
	return filepath.Join(c.DataDir, name)
}

// epochsDir returns the directory in which the ids of the open epoch are kept.
func (c *config) epochsDir() string { return c.inDataDir("epochs") }

// countsFile returns the path of the counts file, with the default resolved; empty if it is
// off, or if there is no place for it.
func (c *config) countsFile() string {
	switch {
	case c.CountsFile == "off", c.CountsFile == "" && (len(c.KafkaBrokers) > 0 || c.DataDir == noDataDir):
		return ""
	case c.CountsFile == "":
		return filepath.Join(c.DataDir, "counts.jsonl")
	}
	return c.CountsFile
}

func (c *config) kafka() stream.KafkaConfig {
	k := stream.KafkaConfig{
		Brokers: c.KafkaBrokers, Topic: c.KafkaTopic, KeysTopic: c.KafkaKeysTopic,
		SASL: c.KafkaSASL, User: c.KafkaUser, PasswordFile: c.KafkaPasswordFile,
	}
	if c.KafkaTLS {
		k.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	return k
}

// memory, redis, spool, callbacks and front return the settings of the parts. main.go adds
// values that exist only at the start.
func (c *config) memory(limit uint64) dedup.Config {
	return dedup.Config{
		Expect: c.expectIDs(limit / 2), MaxBytes: limit / 2, CleanupInterval: c.CleanupInterval, CleanupBatch: c.CleanupBatch,
	}
}

func (c *config) redis() redis.Config {
	return redis.Config{
		URLs: c.RedisURL, Group: c.Group, Window: c.Window, MaxSkew: c.MaxClockSkew,
		FailOpen: c.RedisFail == "open", MaxIDs: c.MaxIDs, MaxKeys: c.MaxKeys,
		SentinelUser: c.RedisSentinelUser, SentinelPassword: string(c.sentinelPassword),
	}
}

func (c *config) spool() stream.SpoolConfig {
	return stream.SpoolConfig{Dir: c.inDataDir("."), Group: c.Group, Instance: c.Instance}
}

func (c *config) callbacks() callback.Config {
	return callback.Config{
		Allow: c.CallbackAllow, Concurrency: c.CallbackConcurrency, Rate: c.CallbackRate,
		Timeout: c.CallbackTimeout, Secret: c.callbackSecret, Group: c.Group,
	}
}

func (c *config) front() server.Config {
	return server.Config{
		Uint64IDs: c.IDFormat == "uint64", DuplicateStatus: c.DuplicateStatus, WindowHeader: c.WindowHeader,
		MaxConns: c.MaxConns, MaxConnsPerAddress: c.MaxConnsPerAddress, SlowTimeout: c.SlowTimeout, IdleTimeout: c.IdleTimeout,
		MaxBatchIDs: c.MaxBatchIDs, MaxBatchBytes: c.MaxBatchBytes, CORSOrigins: c.CORSOrigin,
	}
}

// secretFile returns the secret in the file that a flag names, without the line end; nil if
// path is empty.
func secretFile(flag, path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	b, err := setting.ReadFile(path)
	if err != nil {
		return nil, setting.Errorf(flag, "%v", setting.Cause(err))
	}
	if b = bytes.TrimRight(b, "\r\n"); len(b) == 0 {
		return nil, setting.Errorf(flag, "the file is empty")
	}
	return b, nil
}

// certificate loads the certificate of the public listener. It returns nil for plain HTTP.
func (c *config) certificate(log zerolog.Logger) (*server.Certificate, error) {
	if c.TLSCertFile == "" {
		return nil, nil
	}
	for _, f := range []struct{ name, path string }{{"tls-cert-file", c.TLSCertFile}, {"tls-key-file", c.TLSKeyFile}} {
		if _, err := setting.ReadFile(f.path); err != nil {
			return nil, setting.Errorf(f.name, "%v", setting.Cause(err))
		}
	}
	cert, err := server.LoadCertificate(c.TLSCertFile, c.TLSKeyFile, log)
	if err != nil {
		return nil, setting.Errorf("tls-cert-file", "%v", err)
	}
	return cert, nil
}

// memoryLimit returns how many bytes of memory the process may take: the smallest of the limit
// set for it (GOMEMLIMIT), the limit of its container, and the memory of the machine; 0 if none
// is known. Half of it is for ids. The other half is for connections, the Go heap and, with a
// data directory, the page cache.
func memoryLimit() uint64 {
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
	return limit
}

// limitGoMemory makes the garbage collector work harder when Go's own memory comes near its
// share of limit. The tables of ids are not part of that memory.
func limitGoMemory(limit uint64) {
	if limit > 0 {
		debug.SetMemoryLimit(int64(limit / 32 * 11))
	}
}

// expectIDs returns for how many canonical decimals the tables have room at the start. Without
// --expect-ids that is as many as a busy server gets in its first window, unless memory is
// scarce: in a table that had to grow, the search for a new id visits every level, and each
// level costs a cache miss or two. Memory that is not needed is given back after some windows.
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

// goroutinesField is the field of a log line that holds a dump of goroutines.
const goroutinesField = "goroutines"

// logger returns a logger that writes to w in the format of the settings, and the queue
// between the two.
func (c *config) logger(w *os.File) (zerolog.Logger, *logline.Writer) {
	level, _ := zerolog.ParseLevel(c.LogLevel)                // no error: the flag is an enum
	zerolog.TimeFieldFormat = "2006-01-02T15:04:05.000Z07:00" // windows may be 50 ms long
	var out io.Writer = w
	if c.LogFormat == "console" || c.LogFormat == "auto" && isatty.IsTerminal(w.Fd()) {
		out = zerolog.ConsoleWriter{
			Out: w, TimeFormat: "15:04:05.000", NoColor: !isatty.IsTerminal(w.Fd()),
			FieldsExclude: []string{goroutinesField}, FormatExtra: writeGoroutines,
		}
	}
	lines := logline.NewWriter(out)
	return zerolog.New(lines).Level(level).With().Timestamp().Logger(), lines
}

// writeGoroutines writes a dump of goroutines to a terminal as separate lines.
func writeGoroutines(fields map[string]any, line *bytes.Buffer) error {
	if dump, ok := fields[goroutinesField].(string); ok {
		line.WriteString("\n" + dump)
	}
	return nil
}
