package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// badSetting is a value that can never work.
type badSetting struct {
	name, value string
	shown       string   // the part of the value that the message shows, if not all
	with        []string // other flags that the case needs
}

// badSettings has bad values of every setting that can be wrong.
func badSettings(t *testing.T) []badSetting {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	plain, password := file("plain", "x"), file("password", "secret")
	var all []badSetting
	add := func(name string, values ...string) {
		for _, v := range values {
			all = append(all, badSetting{name: name, value: v})
		}
	}
	add("listen", "nowhere", "localhost:99999", "unix:/x", "no-such-host.invalid:80", ":-1", ":x", "127.0.0.1", "::1:80", "http://127.0.0.1:80", "127.0.0.1:80:80", "'127.0.0.1:80'")
	add("admin-listen", "nowhere", "localhost:99999", "unix:/x", "no-such-host.invalid:80")
	add("window", "fast", "1", "49ms", "61m", "50500us", "-1m", "0", "99999999999h")
	add("max-clock-skew", "-1s", "2", "999us", "25h")
	add("group", "a/b", " a", "a ", "a\u202eb", strings.Repeat("g", 250))
	add("instance", "a/b", "a\u0085b", strings.Repeat("i", 250))
	add("data-dir", plain, filepath.Join(plain, "below"), "data ", " data", "~", "~/data")
	all = append(all,
		badSetting{name: "data-dir", value: `"/data"`, shown: `\"/data\"`},
		badSetting{name: "counts-file", value: "'off'", shown: "'off'"},
	)
	add("counts-file", dir, filepath.Join(plain, "counts.jsonl"), "new/", strings.Repeat("c", 256), strings.Repeat("c", 250))
	add("counts-file", "verve-data/spool.db", "./verve-data/../verve-data/spool.mark", "verve-data/windows.jsonl", "verve-data/last-use.json", "verve-data/group-answers.json", "verve-data/epochs/x", "verve-data/epochs",
		"verve-data/spool-keys", "verve-data/spool-keys/x", "- ", "~/counts.jsonl", "verve-data", "./new/../verve-data")
	all = append(all,
		badSetting{name: "counts-file", value: "new", with: []string{"--data-dir=new/data"}},
		badSetting{name: "counts-file", value: "new.x", with: []string{"--data-dir=new-by-key.x"}},
	)
	if err := os.Mkdir(filepath.Join(dir, "n-by-key"), 0o700); err != nil {
		t.Fatal(err)
	}
	add("counts-file", filepath.Join(dir, "n"))
	all = append(all, badSetting{name: "counts-file", value: file("token", "token"), with: []string{"--admin-token-file=" + filepath.Join(dir, "token")}})
	add("id-format", "hex", "OPAQUE")
	add("dedup", "disk", "memory,redis")
	add("redis-fail", "maybe")
	add("log-level", "loud")
	add("log-format", "xml")
	add("window-header", "perhaps", "2")
	add("kafka-tls", "perhaps")
	add("duplicate-status", "99", "600", "204", "205", "304", "0", "x", "-200", "40.9")
	add("expect-ids", "-1", "many", "1.5", "99999999999999999999", "9999999999999999", "900000000000")
	add("max-ids", "-1", "1.5", "18446744073709551616")
	add("cleanup-interval", "0", "-1s", "1ns", "2h", "soon")
	add("cleanup-batch", "0", "-1", "99999999999", "x")
	add("callback-concurrency", "0", "-1", "10001", "9223372036854775807")
	add("callback-rate", "0", "-1", "NaN", "+Inf", "1e9", "x")
	add("callback-timeout", "0", "-1s", "1ns", "25h", "5")
	add("max-conns", "-1", "9223372036854775807", "9223372036854775808")
	add("max-conns-per-address", "-1", "x")
	add("max-batch-ids", "0", "-1", "1000001", "x")
	add("max-batch-bytes", "0", "-1", "67108865", "x")
	add("max-keys", "0", "-1", "x")
	add("cors-origin", "example.com", "https://example.com/", "null", "https://*.example.com", "https://example.com:443")
	add("slow-timeout", "0", "-1s", "1us", "1000h")
	add("idle-timeout", "0", "-1s", "1us")
	add("shutdown-timeout", "0", "-1s", "x")
	add("shutdown-delay", "-1s")
	add("kafka-brokers", "kafka", "kafka:http", "kafka:99999", "kafka:0", "kafka:-1", "kafka:", ":9092", "a:1,,b:2", "a:1,a:1", ",", "kafka :9092", "a:1;b:2", "a:1 b:2",
		"PLAINTEXT://kafka:9092", "::1:9092", "[::1]", "[::1", "[1.2.3.4]:9092", "1.2.3:9092", "256.1.1.1:9092", "a..b:9092", "ka\\fka:1", "kafka:9092/topic")
	all = append(all,
		badSetting{name: "kafka-brokers", value: `"a:1,b:2"`, shown: `\"a:1,b:2\"`},
		badSetting{name: "kafka-brokers", value: `'a:1'`, shown: `'a:1'`},
		badSetting{name: "kafka-brokers", value: "me:s3cret@kafka:9092", shown: "hidden@kafka:9092"},
	)
	add("kafka-topic", "a b", ".", "..", "a/b", "ä", strings.Repeat("t", 250), "__consumer_offsets", "__transaction_state")
	add("kafka-keys-topic", "a b", "verve.unique-ids", "verve_unique-ids", "__consumer_offsets")
	add("kafka-sasl", "MD5", "PLAIN", "scram-sha-256")
	add("kafka-user", "me")
	add("kafka-password-file", password)
	for _, v := range []string{filepath.Join(dir, "none"), dir, file("empty", "\n"), file("utf-16", "\xff\xfes\x00e\x00"), file("nul", "s\x00e")} {
		all = append(all, badSetting{name: "kafka-password-file", value: v, with: []string{"--kafka-sasl=PLAIN", "--kafka-user=me"}})
	}
	add("redis-url", "h", "h:6379", "http://h", "redis://", "redis://:6379", "redis://h:99999", "redis://h:0", "redis://h:x", "redis://h/x", "redis://h/-1", "redis://h/1/2", "redis://h?db=x", "redis://h/1?db=2",
		"redis://h?db=1&db=2", "redis://h#x", "redis://h?mastre_set=x", "redis://h?skip_verify=true", "rediss://h?skip_verify=perhaps", "redis://h?protocol=1", "redis://h?addr=x", "redis://h?addr=x:99999",
		"redis://h?master_set=", "redis-sentinel://h:26379", "unix://", "unix://h/x", "unix-sentinel:///x?master_set=m", "redis://a b", "redis://1.2.3", "redis:h",
		"redis://a,rediss://b", "redis://a,redis://a", "redis://a,redis://a:6379", "redis://a/1,redis://b", "redis://a,redis://b/1", "unix:///a,unix:///b", "redis://a,,redis://b",
		"redis-sentinel://a?master_set=m,redis-sentinel://b?master_set=n")
	for _, v := range []string{"redis://u:s3cret@h:99999", "redis://u:s3cret/x@h", "redis://u:s3cret#x@h", "redis://u:s3cret?x@h", "redis://u:s3cret%@h", "redis://u:s3cret@h/x", "redis://u:s3cret@a,redis://u:s4cret@b"} {
		all = append(all, badSetting{name: "redis-url", value: v, shown: "redis://hidden@" + v[strings.LastIndexByte(v, '@')+1:]})
	}
	add("callback-allow", "foo", "foo:", ":80", "foo:0", "foo:65536", "foo:http", "http://foo:80", "10.0.0.0/33:80", "10.0.0.1/8:80", "10.0.0.0/8", "*.lan:80", "127.1:80", "a.lan:1,b", "'a.lan:1'")
	all = append(all, badSetting{name: "callback-allow", value: "me:s3cret@foo:80", shown: "hidden@foo:80"})
	short := base64.StdEncoding.EncodeToString([]byte("s3cret"))
	for i, text := range []string{"", "\n", "whsec_", "s3cret s3cret s3cret s3cret s3cret", "whsec_" + short, short, `"whsec_` + base64.StdEncoding.EncodeToString(make([]byte, 32)) + `"`} {
		add("callback-secret-file", file(fmt.Sprint("secret-", i), text))
	}
	add("callback-secret-file", filepath.Join(dir, "none"), dir)
	all = append(all, badSetting{name: "callback-secret-file", value: "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", shown: "not shown"},
		badSetting{name: "admin-token-file", value: "0123456789abcdef0123456789abcdef", shown: "not shown"},
		badSetting{name: "redis-sentinel-password-file", value: "a s3cret that is long", shown: "not shown"})
	add("redis-sentinel-user", "me")
	add("admin-token-file", file("endless", strings.Repeat("x", 4<<20+1)))
	add("admin-token-file", filepath.Join(dir, "none"), dir, file("no-token", ""), file("two-words", "s3cret s3cret"))
	add("tls-cert-file", plain)
	add("tls-key-file", plain)
	all = append(all,
		badSetting{name: "tls-cert-file", value: filepath.Join(dir, "none"), with: []string{"--tls-key-file=" + plain}},
		badSetting{name: "tls-cert-file", value: plain, with: []string{"--tls-key-file=" + plain}},
		badSetting{name: "tls-key-file", value: filepath.Join(dir, "none"), with: []string{"--tls-cert-file=" + plain}},
		badSetting{name: "admin-listen", value: "127.0.0.1:20001", with: []string{"--listen=127.0.0.1:20001"}},
		badSetting{name: "admin-listen", value: ":20001", with: []string{"--listen=127.0.0.1:20001"}},
		badSetting{name: "admin-listen", value: "localhost:20001", with: []string{"--listen=0.0.0.0:20001"}},
		badSetting{name: "admin-listen", value: "127.0.0.1:20001", with: []string{"--listen=[::]:20001"}},
		badSetting{name: "admin-listen", value: "[::1]:20001", with: []string{"--listen=0.0.0.0:20001"}},
		badSetting{name: "data-dir", value: "none", with: []string{"--counts-file="}},
	)
	return all
}

// TestBadSettingsAreNamedBeforeAnythingIsTouched: a value that can never work stops the start
// with one line that has the flag, the value and its source, and no file was made.
func TestBadSettingsAreNamedBeforeAnythingIsTouched(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for i, bad := range badSettings(t) {
		what := fmt.Sprintf("%d: %s=%q", i, bad.name, bad.value)
		if bad.shown == "" {
			bad.shown = strings.Trim(strconv.Quote(bad.value), `"`)
			bad.shown = bad.shown[:min(len(bad.shown), 190)]
		}
		_, _, err := parse(append(bad.with, "--"+bad.name+"="+bad.value), io.Discard)
		wantNamed(t, err, what, "--"+bad.name, bad.shown, "from the command line")

		variable := "VERVE_" + strings.ToUpper(strings.ReplaceAll(bad.name, "-", "_"))
		t.Setenv(variable, bad.value)
		_, _, err = parse(bad.with, io.Discard)
		wantNamed(t, err, what, "--"+bad.name, bad.shown, "from "+variable)
		if err := os.Unsetenv(variable); err != nil {
			t.Fatal(err)
		}

		text, err := json.Marshal(map[string]string{bad.name: bad.value})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "settings.json")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		_, _, err = parse(append(bad.with, "--config="+path), io.Discard)
		wantNamed(t, err, what, "--"+bad.name, bad.shown, "from "+path+", key "+bad.name)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}

// wantNamed checks the error of a bad setting, from which main makes the line and the exit
// code.
func wantNamed(t *testing.T, err error, what string, parts ...string) {
	t.Helper()
	var usage usageError
	if !errors.As(err, &usage) {
		t.Errorf("%s: got %v, want a bad setting", what, err)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%s: no %s in %v", what, part, err)
		}
	}
	if text := err.Error(); strings.Contains(text, "\n") || strings.Contains(text, "s3cret") || strings.Contains(text, "s4cret") {
		t.Errorf("%s: more than a line, or a secret: %s", what, text)
	}
}

// TestWhatIsNotInUTF8IsRefused: such a value would become the name of another file or instance.
// A settings file may begin with the byte order mark that some editors write.
func TestWhatIsNotInUTF8IsRefused(t *testing.T) {
	const latin1 = "m\xfcller"
	for _, name := range []string{"data-dir", "counts-file", "instance", "group", "kafka-topic", "tls-cert-file"} {
		_, _, err := parse([]string{"--" + name + "=" + latin1}, io.Discard)
		wantNamed(t, err, name, "--"+name, `m\xfcller`, "from the command line", "UTF-8")
	}
	path := filepath.Join(t.TempDir(), "settings.yaml")
	for text, good := range map[string]bool{"instance: " + latin1: false, "\xff\xfei\x00": false, "\ufeffinstance: x\r\n": true, "\ufeff{\"instance\":\"x\"}": true} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, _, err := parse([]string{"--config=" + path}, io.Discard)
		if !good {
			wantNamed(t, err, text, "--config", path, "UTF-8")
		} else if err != nil || c.Instance != "x" {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestMarkOfAnEditorIsNoPartOfASecret, nor is the end of its line: a server would refuse it.
func TestMarkOfAnEditorIsNoPartOfASecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte("\ufeffs3cret\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, _, err := parse([]string{"--admin-token-file=" + path, "--redis-url=redis-sentinel://h?master_set=m", "--redis-sentinel-password-file=" + path}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if string(c.adminToken) != "s3cret" || string(c.sentinelPassword) != "s3cret" {
		t.Errorf("the token is %q and the password %q", c.adminToken, c.sentinelPassword)
	}
}

// TestValuesOfAnotherKindInAFileAreNotMissing: the line names what is wanted.
func TestValuesOfAnotherKindInAFileAreNotMissing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "settings.yaml")
	if err := os.WriteFile(path, []byte("window: [1s]"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := parse([]string{"--config=" + path}, io.Discard)
	wantNamed(t, err, "a list", "--window", "key window", "want one value, not a list")
	if err != nil && strings.Contains(err.Error(), "missing") {
		t.Error(err)
	}
}

// TestGoodSettingsAreTaken: values that users write and that work, similar to those that are
// refused above.
func TestGoodSettingsAreTaken(t *testing.T) {
	dir := t.TempDir()
	for _, arg := range []string{
		"--kafka-brokers=a:1, b:2", "--kafka-brokers= a:1 ,b:2 ", "--kafka-brokers=[::1]:9092,[fe80::1%eth0]:9092", "--kafka-brokers=my_kafka.lan.:9092", "--kafka-brokers=10.1.2.3:9092", "--kafka-brokers=",
		"--redis-url=redis://h", "--redis-url=rediss://u:p%40w@h:6380/3?skip_verify=true&protocol=2", "--redis-url=redis://:p@h", "--redis-url=redis://u:p@a,redis://b", "--redis-url=redis://[::1]:6379",
		"--redis-url=redis-sentinel://u:p@a:26379/1?master_set=m,redis-sentinel://b:26379", "--redis-url=redis://a:26379?master_set=m", "--redis-url=unix:///run/redis.sock?db=1", "--redis-url=redis://a?addr=b:1&addr=c:2", "--redis-url=valkey://a",
		"--callback-allow=a.lan:1, 10.0.0.0/8:2", "--callback-allow=[fd00::/8]:80", "--callback-allow=[::1]:80",
		"--group=größe {x}", "--instance=host-1.example.com", "--instance=",
		"--listen=[::1]:0", "--listen=localhost:http", "--listen=:8081", "--window=50ms", "--window=1h", "--max-clock-skew=0", "--max-ids=0", "--duplicate-status=200",
		"--counts-file=" + filepath.Join(dir, "new", "counts.jsonl"), "--counts-file=-", "--counts-file=off", "--data-dir=" + filepath.Join(dir, "a", "b"), "--data-dir=./~", "--data-dir=a~ 'b'", "--data-dir=none --counts-file=off",
		"--kafka-topic=Verve_1.unique-ids", "--dedup=redis",
	} {
		args := []string{"--admin-listen=127.0.0.1:0", arg}
		if first, second, two := strings.Cut(arg, " --"); two {
			args = append(args[:1], first, "--"+second)
		}
		if _, _, err := parse(args, io.Discard); err != nil {
			t.Errorf("%s: %v", arg, err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("parse left %v, %v", left, err)
	}
	c, _, err := parse([]string{"--kafka-brokers=a:1, b:2"}, io.Discard)
	if err != nil || fmt.Sprint(len(c.KafkaBrokers), c.KafkaBrokers) != "2 [a:1 b:2]" {
		t.Errorf("brokers with space after the comma: %q, %v", c.KafkaBrokers, err)
	}
}

// TestDoubtfulSettingsAreReported: settings that work, but have no effect or a bad one.
func TestDoubtfulSettingsAreReported(t *testing.T) {
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull) // as Go does if standard output is closed
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	defer func(was *os.File) { os.Stdout = was }(os.Stdout)
	os.Stdout = null
	sasl := "--kafka-sasl=PLAIN --kafka-user=u --kafka-password-file=" + password
	for args, want := range map[string][]string{
		"":                                {},
		"--kafka-topic=counts":            {"--kafka-topic (from the command line) has no effect"},
		"--kafka-tls " + sasl:             {"--kafka-tls", "--kafka-sasl"},
		"--kafka-brokers=a:1 " + sasl:     {"--kafka-sasl=PLAIN without --kafka-tls"},
		"--kafka-brokers=a:1 --kafka-tls": {},
		"--counts-file=" + os.DevNull:     {"--counts-file=" + os.DevNull + " keeps no records"},
		"--counts-file=-":                 {"--counts-file=- keeps no records"},
	} {
		c, _, err := parse(strings.Fields(args), io.Discard)
		if err != nil {
			t.Fatalf("%s: %v", args, err)
		}
		got := c.doubtful()
		if len(got) != len(want) {
			t.Errorf("%s: got %q, want %d lines", args, got, len(want))
			continue
		}
		for i := range want {
			if !strings.HasPrefix(got[i], want[i]) {
				t.Errorf("%s: got %q, want %q", args, got[i], want[i])
			}
		}
	}
}

// TestVariablesOfOthersMeanNothing: variables that Kubernetes and Docker set for a service with
// the name of the program are ignored.
func TestVariablesOfOthersMeanNothing(t *testing.T) {
	for _, variable := range []string{
		"VERVE_SERVICE_HOST=10.96.0.12", "VERVE_SERVICE_HOST=fd00::12", "VERVE_SERVICE_PORT=8080", "VERVE_SERVICE_PORT_HTTP=8080", "VERVE_PORT=tcp://10.96.0.12:8080", "VERVE_PORT=udp://[fd00::12]:53",
		"VERVE_PORT_8080_TCP=tcp://10.96.0.12:8080", "VERVE_PORT_8080_TCP_PROTO=tcp", "VERVE_PORT_8080_TCP_PORT=8080", "VERVE_PORT_8080_TCP_ADDR=10.96.0.12",
		"VERVE_ADMIN_SERVICE_HOST=10.96.0.13", "VERVE_ADMIN_SERVICE_PORT_METRICS=8081", "VERVE_HEADLESS_PORT_8081_TCP_ADDR=10.96.0.14", "VERVE_MY_REDIS_PORT=tcp://10.96.0.15:6379",
		"VERVE_NAME=/web/verve", "VERVE_ENV_PATH=/bin", "VERVE_PORT_8080_TCP_START=tcp://172.17.0.2:8080",
		"VERVE_LISTEN=tcp://10.96.0.12:8080",                                                             // the name of a setting, but not a value of it
		"VERVE_WINDOW=", "VERVE_DEDUP=", "VERVE_KAFKA_BROKERS=", "VERVE_CONFIG=", "VERVE_NO_SUCH_THING=", // empty is not set
		"VERVE_TEST_X=1", "VERVES=1", "verve_window=fast",
	} {
		name, value, _ := strings.Cut(variable, "=")
		t.Run(name, func(t *testing.T) {
			t.Setenv(name, value)
			c, _, err := parse(nil, io.Discard)
			if err != nil {
				t.Fatalf("%s: %v", variable, err)
			}
			if c.Listen != ":8080" || c.Window != time.Minute || c.Dedup != "memory" {
				t.Errorf("%s changed a setting: %s %s %s", variable, c.Listen, c.Window, c.Dedup)
			}
		})
	}
}

// TestFlagOverEnvironmentOverFile checks the precedence of the sources of settings.
func TestFlagOverEnvironmentOverFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "settings.json")
	if err := os.WriteFile(path, []byte(`{"window": "3s", "group": "file", "instance": "file", "max-ids": 5, "callback-allow": ["a.example.com:1", "b.example.com:2"]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("VERVE_CONFIG", path)
	t.Setenv("VERVE_GROUP", "env")
	t.Setenv("VERVE_INSTANCE", "env")
	c, command, err := parse([]string{"--instance=flag"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprint(command, " ", c.Window, c.Group, c.Instance, c.MaxIDs, c.CallbackAllow, c.KafkaTopic)
	if want := "serve 3senvflag5 [a.example.com:1 b.example.com:2]verve.unique-ids"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestTextInAFileStaysAsItIsWritten: 007 is not the instance 7.
func TestTextInAFileStaysAsItIsWritten(t *testing.T) {
	for text, want := range map[string]string{"007": "007", "0x1F": "0x1F", "1.50": "1.50", "1_000": "1_000", "True": "True", ".inf": ".inf", "1e3": "1e3", `"08"`: "08", "2026-11-22": "2026-11-22"} {
		path := filepath.Join(t.TempDir(), "settings.yaml")
		if err := os.WriteFile(path, []byte("---\ninstance: "+text+" # a comment\nmax-ids: 1_000\nwindow-header: True\n---\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		c, _, err := parse([]string{"--config=" + path}, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if c.Instance != want || c.MaxIDs != 1000 || !c.WindowHeader {
			t.Errorf("%s: got %q, %d, %v", text, c.Instance, c.MaxIDs, c.WindowHeader)
		}
	}
}

// TestRepeatableSettingsTakeSeveralValuesFromEachSource: on the command line, in the
// environment and in the file.
func TestRepeatableSettingsTakeSeveralValuesFromEachSource(t *testing.T) {
	for name, list := range map[string][]string{
		"redis-url":      {"redis://a", "redis://b"},
		"kafka-brokers":  {"a:1", "b:2"},
		"callback-allow": {"a.lan:1", "b.lan:2"},
		"cors-origin":    {"https://a.example.com", "https://b.example.com"},
	} {
		check := func(source string, args ...string) {
			t.Helper()
			c, _, err := parse(args, io.Discard)
			if err != nil {
				t.Errorf("%s: %v", source, err)
				return
			}
			got := map[string][]string{"redis-url": c.RedisURL, "kafka-brokers": c.KafkaBrokers, "callback-allow": c.CallbackAllow, "cors-origin": c.CORSOrigin}[name]
			if !slices.Equal(got, list) {
				t.Errorf("%s: --%s is %q, want %q", source, name, got, list)
			}
		}
		var repeated []string
		for _, v := range list {
			repeated = append(repeated, "--"+name+"="+v)
		}
		check("flags", repeated...)
		check("a flag", "--"+name+"="+strings.Join(list, ", "))
		for _, text := range []string{"[" + strings.Join(list, ", ") + "]", "\n- " + strings.Join(list, "\n- "), strings.Join(list, ",")} {
			path := filepath.Join(t.TempDir(), "settings.yaml")
			if err := os.WriteFile(path, []byte(name+": "+text+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			check("file "+text, "--config="+path)
		}
		t.Run(name, func(t *testing.T) {
			t.Setenv("VERVE_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_")), strings.Join(list, ","))
			check("environment")
		})
	}
}

// FuzzSettings: any --config file is accepted, or refused with one line; and if it is accepted,
// --print-config prints a file with the same effect.
func FuzzSettings(f *testing.F) {
	for _, s := range []string{
		"", "window: 2s", "group: x\nkafka-brokers: [a:1, b:2]\n", `{"window": "3s", "max-ids": 5}`, "callback-allow:\n  - a.lan:1\n  - 10.0.0.0/8:2\n",
		"window: 1e3", "a: b: c", "max-ids: -1", "max-ids: 18446744073709551615", "callback-rate: .nan", "group: {a: b}", "group: &a [*a]", "window: !!binary eA==", "listen: :0\nwindow-header: yes",
		"group: \"\\u0000\"", "instance: ' x '", "kafka-brokers: \"a,b\"", "callback-allow: [\"a,b:1\"]", "log-level: debug # x", "group: # nothing",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		path := filepath.Join(t.TempDir(), "settings.yaml")
		read := func(text []byte) (*config, error) {
			if err := os.WriteFile(path, text, 0o600); err != nil {
				t.Fatal(err)
			}
			c, _, err := parse([]string{"--config=" + path}, io.Discard)
			return c, err
		}
		first, err := read(file)
		if err != nil {
			var usage usageError
			if !errors.As(err, &usage) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("%q: %T %v", file, err, err)
			}
			return
		}
		var printed, again bytes.Buffer
		if err := first.print(&printed); err != nil {
			t.Fatalf("%q: %v", file, err)
		}
		if strings.Contains(printed.String(), "hidden@") {
			return // not meant to be read back
		}
		second, err := read(printed.Bytes())
		if err != nil {
			t.Fatalf("%q is printed as\n%s\nwhich is refused: %v", file, printed.String(), err)
		}
		if err := second.print(&again); err != nil {
			t.Fatal(err)
		}
		values := func(b *bytes.Buffer) string {
			return regexp.MustCompile(`(?m) +# \S+$`).ReplaceAllString(b.String(), "") // the sources differ
		}
		if values(&printed) != values(&again) {
			t.Fatalf("%q is printed as\n%s\nand read back as\n%s", file, printed.String(), again.String())
		}
	})
}

func TestPasswordsInURLsAreNotPrinted(t *testing.T) {
	for in, want := range map[string]string{
		"redis://user:pw@host:6379":       "redis://hidden@host:6379",
		"rediss://:p/w@a:1,redis://:q@b":  "rediss://hidden@b",
		"redis://u:50%@x@host":            "redis://hidden@host",
		"redis://127.0.0.1:6379":          "redis://127.0.0.1:6379",
		"verve.unique-ids":                "verve.unique-ids",
		"http://x.example.com/?a=b&c=d:e": "http://x.example.com/?a=b&c=d:e",
	} {
		if got := withoutPassword(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}
