package deploy_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"verve/internal/testproc"
	"verve/server"
)

// composeFile is what the tests look at; that the file as a whole is valid is
// for .ci/run, which reads it with Compose's own library.
type composeFile struct {
	Services map[string]struct {
		Build           string
		Image           string
		Environment     map[string]string
		DependsOn       map[string]struct{ Condition string } `yaml:"depends_on"`
		StopGracePeriod string                                `yaml:"stop_grace_period"`
		CapDrop         []string                              `yaml:"cap_drop"`
		SecurityOpt     []string                              `yaml:"security_opt"`
		ReadOnly        bool                                  `yaml:"read_only"`
		Healthcheck     struct{ Test []string }
	}
}

func readCompose(t *testing.T) composeFile {
	t.Helper()
	b, err := os.ReadFile("../docker-compose.yml")
	if err != nil {
		t.Fatal(err)
	}
	var f composeFile
	if err := yaml.Unmarshal(b, &f); err != nil {
		t.Fatal(err)
	}
	return f
}

// imageSettings are the ENV lines of the Dockerfile.
func imageSettings(t *testing.T) map[string]string {
	t.Helper()
	b, err := os.ReadFile("../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	settings := make(map[string]string)
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		if env, ok := strings.CutPrefix(lines.Text(), "ENV "); ok {
			name, value, _ := strings.Cut(env, "=")
			settings[name] = value
		}
	}
	return settings
}

func TestContainersUseSettingsThatExist(t *testing.T) {
	for name, settings := range map[string]map[string]string{
		"compose":    readCompose(t).Services["verve"].Environment,
		"instance-1": readCompose(t).Services["instance-1"].Environment,
		"instance-2": readCompose(t).Services["instance-2"].Environment,
		"kubernetes": podSettings(t, "base"),
		"instances":  podSettings(t, "base", "instances"),
		"systemd":    unitSettings(t),
	} {
		t.Run(name, func(t *testing.T) {
			all := imageSettings(t)
			maps.Copy(all, settings)
			parseSettings(t, all)
		})
	}
}

// settings are what the tests look at of a configuration.
type settings struct {
	Listen          string
	DataDir         string        `yaml:"data-dir"`
	Dedup           string        `yaml:"dedup"`
	ShutdownDelay   time.Duration `yaml:"shutdown-delay"`
	ShutdownTimeout time.Duration `yaml:"shutdown-timeout"`
}

// parseSettings has the server read the variables, which refuses those that it does
// not know.
func parseSettings(t *testing.T, variables map[string]string) (s settings) {
	t.Helper()
	cmd := testproc.Verve(t, "--print-config")
	for name, value := range variables {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	printed, err := cmd.Output()
	if err != nil {
		t.Fatalf("the settings are refused: %v %s", err, stderr.String())
	}
	if err := yaml.Unmarshal(printed, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestMain(m *testing.M) { testproc.Main(m) }

func TestContainerHasTimeToStop(t *testing.T) {
	for _, name := range []string{"verve", "instance-1", "instance-2"} {
		t.Run(name, func(t *testing.T) {
			service := readCompose(t).Services[name]
			grace, err := time.ParseDuration(service.StopGracePeriod)
			if err != nil {
				t.Fatal(err)
			}
			cfg := parseSettings(t, service.Environment)
			if own := cfg.ShutdownDelay + cfg.ShutdownTimeout; grace <= own {
				t.Errorf("got %s until the engine kills the server, want more than its own %s", grace, own)
			}
		})
	}
}

func TestContainersArePinnedAndConfined(t *testing.T) {
	pinned := regexp.MustCompile(`^[a-z]+(/[a-z]+)?:v?[0-9]+\.[0-9]+\.[0-9]+(-[a-z0-9.]+)?$`)
	f := readCompose(t)
	for name, s := range f.Services {
		if s.Build == "" && !pinned.MatchString(s.Image) {
			t.Errorf("%s: image %q has no exact version", name, s.Image)
		}
		if len(s.CapDrop) != 1 || s.CapDrop[0] != "ALL" {
			t.Errorf("%s: got cap_drop %v, want ALL", name, s.CapDrop)
		}
		if len(s.SecurityOpt) != 1 || s.SecurityOpt[0] != "no-new-privileges:true" {
			t.Errorf("%s: got security_opt %v, want no-new-privileges:true", name, s.SecurityOpt)
		}
		for other, d := range s.DependsOn {
			checked := len(f.Services[other].Healthcheck.Test) > 0 || f.Services[other].Build != "" // by the Dockerfile
			if d.Condition != "service_healthy" || !checked {
				t.Errorf("%s waits for %s to be %q, want service_healthy and a check for it", name, other, d.Condition)
			}
		}
	}
	image, err := os.ReadFile("../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	// By number, and not root's: what runAsNonRoot of Kubernetes asks for.
	if !regexp.MustCompile(`(?m)^USER [1-9][0-9]*:[1-9][0-9]*$`).Match(image) {
		t.Error("verve: the image does not run as a user of its own")
	}
	if !f.Services["verve"].ReadOnly {
		t.Error("verve: the root file system can be written to")
	}
}

// manifest is what the tests look at of a Kubernetes object; that all of it is
// valid is for .ci/run, which has the schemas.
type manifest struct {
	Kind     string
	Metadata struct{ Name string }
	Spec     struct {
		Replicas       int
		ServiceName    string `yaml:"serviceName"`
		MaxUnavailable int    `yaml:"maxUnavailable"`
		Template       struct {
			Spec struct {
				Grace           int             `yaml:"terminationGracePeriodSeconds"`
				SecurityContext securityContext `yaml:"securityContext"`
				Containers      []container
			}
		}
	}
}

type container struct {
	Env []struct{ Name, Value string }

	StartupProbe    probe           `yaml:"startupProbe"`
	LivenessProbe   probe           `yaml:"livenessProbe"`
	ReadinessProbe  probe           `yaml:"readinessProbe"`
	SecurityContext securityContext `yaml:"securityContext"`
	VolumeMounts    []struct {
		MountPath string `yaml:"mountPath"`
	} `yaml:"volumeMounts"`
}

type probe struct {
	HTTPGet struct{ Path, Port string } `yaml:"httpGet"`
}

type securityContext struct {
	RunAsNonRoot             bool  `yaml:"runAsNonRoot"`
	RunAsUser                int   `yaml:"runAsUser"`
	ReadOnlyRootFilesystem   bool  `yaml:"readOnlyRootFilesystem"`
	AllowPrivilegeEscalation *bool `yaml:"allowPrivilegeEscalation"`
	Capabilities             struct{ Drop []string }
}

// manifests are the objects of deploy/kubernetes/base by kind.
func manifests(t *testing.T) map[string][]manifest {
	t.Helper()
	files, err := filepath.Glob("kubernetes/base/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifests: %v", err)
	}
	objects := make(map[string][]manifest)
	for _, file := range files {
		if filepath.Base(file) == "kustomization.yaml" {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for docs := yaml.NewDecoder(bytes.NewReader(b)); ; {
			var m manifest
			if err := docs.Decode(&m); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			objects[m.Kind] = append(objects[m.Kind], m)
		}
	}
	return objects
}

// podSettings are the environment of the pod: its own, and that of the config
// map as the layers put it together.
func podSettings(t *testing.T, layers ...string) map[string]string {
	t.Helper()
	settings := make(map[string]string)
	for _, layer := range layers {
		b, err := os.ReadFile("kubernetes/" + layer + "/kustomization.yaml")
		if err != nil {
			t.Fatal(err)
		}
		var k struct {
			ConfigMaps []struct{ Literals []string } `yaml:"configMapGenerator"`
		}
		if err := yaml.Unmarshal(b, &k); err != nil {
			t.Fatal(err)
		}
		for _, m := range k.ConfigMaps {
			for _, literal := range m.Literals {
				name, value, _ := strings.Cut(literal, "=")
				settings[name] = value
			}
		}
	}
	for _, e := range manifests(t)["StatefulSet"][0].Spec.Template.Spec.Containers[0].Env {
		settings[e.Name] = e.Value
	}
	return settings
}

func TestPodIsConfinedAndStopsInOrder(t *testing.T) {
	objects := manifests(t)
	for _, kind := range []string{"StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy"} {
		if len(objects[kind]) == 0 {
			t.Errorf("there is no %s", kind)
		}
	}
	set := objects["StatefulSet"][0].Spec
	pod, c := set.Template.Spec, set.Template.Spec.Containers[0]
	cfg := parseSettings(t, podSettings(t, "base"))

	own := cfg.ShutdownDelay + cfg.ShutdownTimeout
	if grace := time.Duration(pod.Grace) * time.Second; cfg.ShutdownDelay == 0 || grace <= own {
		t.Errorf("got %v until the kubelet kills the server, want more than its own %v, with a delay", grace, own)
	}
	for path, p := range map[string]probe{"/healthz": c.LivenessProbe, "/readyz": c.ReadinessProbe} {
		if p.HTTPGet.Path != path || p.HTTPGet.Port != "admin" {
			t.Errorf("got a probe of %+v, want %s of admin", p.HTTPGet, path)
		}
	}
	if !pod.SecurityContext.RunAsNonRoot || pod.SecurityContext.RunAsUser == 0 {
		t.Error("the pod may run as root")
	}
	s := c.SecurityContext
	if !s.ReadOnlyRootFilesystem || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation || !slices.Equal(s.Capabilities.Drop, []string{"ALL"}) {
		t.Errorf("the container is not confined: %+v", s)
	}
	if len(c.VolumeMounts) != 1 || c.VolumeMounts[0].MountPath != cfg.DataDir {
		t.Errorf("the data directory %s is on no volume", cfg.DataDir)
	}
	if set.Replicas != 1 && cfg.Dedup == "memory" {
		t.Errorf("%d instances that know nothing of each other behind one service", set.Replicas)
	}
	if b := objects["PodDisruptionBudget"][0].Spec; b.MaxUnavailable != 1 {
		t.Errorf("maxUnavailable is %d: nodes could not be drained, or lose all instances at once", b.MaxUnavailable)
	}
	if !slices.ContainsFunc(objects["Service"], func(m manifest) bool { return m.Metadata.Name == set.ServiceName }) {
		t.Errorf("there is no service %s", set.ServiceName)
	}
}

// unit are the last values of the settings in deploy/systemd/verve.service.
func unit(t *testing.T) map[string]string {
	t.Helper()
	return assignments(t, "systemd/verve.service")
}

// assignments are the lines NAME=VALUE of a file.
func assignments(t *testing.T, file string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	values := make(map[string]string)
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(name, "#") {
			values[name] = value
		}
	}
	return values
}

// unitSettings are the environment of the systemd unit, with those of its file
// that are commented out.
func unitSettings(t *testing.T) map[string]string {
	t.Helper()
	name, value, _ := strings.Cut(unit(t)["Environment"], "=")
	settings := map[string]string{name: value}
	b, err := os.ReadFile("systemd/verve.env")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^#?(VERVE_[A-Z_]+)=(.*)$`).FindAllStringSubmatch(string(b), -1) {
		settings[m[1]] = m[2]
	}
	return settings
}

func TestUnitRestartsAndStopsInOrder(t *testing.T) {
	u := unit(t)
	cfg := parseSettings(t, unitSettings(t))
	own := cfg.ShutdownDelay + cfg.ShutdownTimeout
	if grace, err := time.ParseDuration(u["TimeoutStopSec"]); err != nil || grace <= own {
		t.Errorf("got %v until systemd kills the server, %v, want more than its own %v", grace, err, own)
	}
	// systemctl start waits for READY=1, and the socket outlives the service.
	socket := assignments(t, "systemd/verve.socket")
	if u["Type"] != "notify" || u["Requires"] != "verve.socket" || socket["FileDescriptorName"] != "public" {
		t.Errorf("got Type=%s, Requires=%s, FileDescriptorName=%s, want notify, verve.socket, public", u["Type"], u["Requires"], socket["FileDescriptorName"])
	}
	if ":"+socket["ListenStream"] != cfg.Listen {
		t.Errorf("got a socket at port %s, want the usual %s", socket["ListenStream"], cfg.Listen)
	}
	if files, err := strconv.Atoi(u["LimitNOFILE"]); err != nil || server.LimitsFor(server.Config{Descriptors: uint64(files)}).Lowered != "" {
		t.Errorf("got %d descriptors, %v, want enough for %d connections", files, err, server.DefaultMaxConns)
	}
	if u["Restart"] != "on-failure" || u["RestartPreventExitStatus"] != "2" {
		t.Errorf("got Restart=%s, but for status %s: want one after a failure that is no bad setting, whose exit code is 2", u["Restart"], u["RestartPreventExitStatus"])
	}
	if u["StateDirectory"] == "" || cfg.DataDir != "%S/"+u["StateDirectory"] {
		t.Errorf("the data directory %s is not the state directory %s", cfg.DataDir, u["StateDirectory"])
	}
}

// TestOperatorHasTheSameAlerts as everybody else: make rules copies them.
func TestOperatorHasTheSameAlerts(t *testing.T) {
	read := func(file string, to any) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.Unmarshal(b, to); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
	}
	var plain struct{ Groups any }
	var operator struct{ Spec struct{ Groups any } }
	read("prometheus/verve.rules.yml", &plain)
	read("kubernetes/monitoring/rules.yaml", &operator)
	if plain.Groups == nil || !reflect.DeepEqual(plain.Groups, operator.Spec.Groups) {
		t.Error("kubernetes/monitoring/rules.yaml is not verve.rules.yml: run make rules")
	}
}
