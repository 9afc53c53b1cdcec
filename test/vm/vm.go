package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/test/require"
	"github.com/qcow-csi/qcow-csi/test/vm/handover"
)

const (
	kernel     = "linux.uml"
	modulesDir = "/usr/lib/uml/modules" // one directory for each version

	module = "github.com/qcow-csi/qcow-csi"

	requireVariable = "QCOW_CSI_REQUIRE" // of package require; it holds in the guest, too
)

// Guest says what to run where.
type Guest struct {
	Package string        // whose tests to run, relative to the module, such as "driver/attach/nbd"
	Args    []string      // for the test binary, such as "-test.run=Conformance"
	Program string        // a command to build for the tests, such as "cmd/qcow-csi"; handover.ProgramVariable names its file
	Modules []string      // kernel modules to load, by name
	Disk    int64         // length in bytes of an ext4 filesystem, sparse, on handover.DiskDir; 0 for none
	Memory  int           // MiB; 0 means 512
	Timeout time.Duration // of the guest, from its start to its end; 0 means 2 minutes
}

// Run runs the tests of g.Package in a guest, and fails t unless they pass. It skips t where there is no User Mode
// Linux. It returns what the guest printed.
func Run(t *testing.T, g Guest) (console string) {
	t.Helper()
	require.Tool(t, kernel, "go")
	console, err := run(t, g)
	switch {
	case err != nil:
		t.Errorf("%v; the guest printed:\n%s", err, console)
	case testing.Verbose():
		t.Log(console)
	}
	return console
}

// run returns an error unless the tests have run and passed.
func run(t *testing.T, g Guest) (console string, err error) {
	t.Helper()
	if g.Memory == 0 {
		g.Memory = 512
	}
	if g.Timeout == 0 {
		g.Timeout = 2 * time.Minute
	}
	dir := t.TempDir()
	order := handover.Order{
		Modules: moduleFiles(t, g.Modules),
		Binary:  filepath.Join(dir, "guest.test"),
		Args:    append([]string{"-test.v"}, g.Args...),
		Timeout: g.Timeout,
	}
	if value, ok := os.LookupEnv(requireVariable); ok {
		order.Env = append(order.Env, requireVariable+"="+value)
	}
	if g.Program != "" {
		program := filepath.Join(dir, "program")
		goTool(t, "build", "-o", program, module+"/"+g.Program)
		order.Env = append(order.Env, handover.ProgramVariable+"="+program)
	}
	goTool(t, "test", "-c", "-tags", "vmguest", "-o", order.Binary, module+"/"+g.Package)
	goTool(t, "build", "-o", filepath.Join(dir, "init"), module+"/test/vm/init")
	command := []string{
		fmt.Sprintf("mem=%dM", g.Memory),
		"root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro",
		"init=" + filepath.Join(dir, "init"),
		"con=null", "con0=null,fd:1", "quiet",
		"uml_dir=" + dir, "umid=guest",
		handover.Variable + "=" + dir,
	}
	if g.Disk > 0 {
		disk := filepath.Join(dir, "disk")
		makeDisk(t, disk, g.Disk)
		order.Disk = true
		command = append(command, "ubd0="+disk)
	}
	raw, err := json.Marshal(order)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, handover.OrderFile), raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	console, err = boot(t, g.Timeout, command)
	if err != nil {
		return console, fmt.Errorf("the guest did not end well: %w", err)
	}
	status, err := os.ReadFile(filepath.Join(dir, handover.StatusFile))
	switch {
	case err != nil:
		return console, fmt.Errorf("the tests did not end: %w", err)
	case string(status) != "exit status 0":
		return console, fmt.Errorf("the tests failed: %s", status)
	case strings.Contains(console, "testing: warning: no tests to run"):
		return console, errors.New("there was no such test")
	}
	return console, nil
}

// boot runs the guest until it powers off, and returns what it printed. The guest keeps the time itself; one that is well
// past that is killed.
func boot(t *testing.T, timeout time.Duration, args []string) (console string, err error) {
	ctx, cancel := context.WithTimeout(t.Context(), timeout+30*time.Second)
	defer cancel()
	var output bytes.Buffer
	cmd := exec.CommandContext(ctx, kernel, args...)
	cmd.Stdout, cmd.Stderr = &output, &output
	// The kernel runs every process of the guest as one of the host's. They are a group, and are killed as one.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Run()
	return output.String(), errors.Join(err, ctx.Err())
}

// goTool runs the go command, for binaries that need nothing of the guest's userland.
func goTool(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func makeDisk(t *testing.T, path string, size int64) {
	t.Helper()
	require.Tool(t, "mkfs.ext4")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-F", path).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
}

// moduleFiles returns the files of the modules and of what they need, in the order in which to load them.
func moduleFiles(t *testing.T, names []string) []string {
	t.Helper()
	if len(names) == 0 {
		return nil
	}
	version, err := exec.CommandContext(t.Context(), kernel, "--version").Output()
	if err != nil {
		t.Fatalf("%s --version: %v", kernel, err)
	}
	dir := filepath.Join(modulesDir, strings.TrimSpace(string(version)))
	dependencies, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	require.Feature(t, err == nil, fmt.Sprintf("needs the modules of %s: %v", kernel, err))
	var files []string
	for _, name := range names {
		found := false
		for line := range strings.Lines(string(dependencies)) {
			// kernel/fs/a.ko: kernel/lib/needed.ko kernel/lib/needed-by-that.ko
			file, needs, _ := strings.Cut(strings.TrimSpace(line), ":")
			if filepath.Base(file) != name+".ko" {
				continue
			}
			found = true
			order := append(strings.Fields(needs), file)
			slices.Reverse(order[:len(order)-1])
			for _, f := range order {
				files = append(files, filepath.Join(dir, f))
			}
		}
		require.Feature(t, found, fmt.Sprintf("needs the module %s of %s", name, kernel))
	}
	return files
}
