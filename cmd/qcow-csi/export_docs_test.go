package main

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/pflag"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// exportDocumentation is the reference of the export command.
const exportDocumentation = "../../docs/export.md"

// TestExportDocumentationRuns runs every example of the documentation, in order, in one folder.
func TestExportDocumentationRuns(t *testing.T) {
	require.Tool(t, "nbdinfo", "qemu-io", "qemu-img", "openssl")
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin, dir := t.TempDir(), t.TempDir()
	if err := os.Symlink(executable, filepath.Join(bin, "qcow-csi")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, pid := range workingIn(t, dir) {
			t.Errorf("process %d is still there", pid)
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended by now
		}
	})
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(free.Addr().String())
	free.Close()
	blocks := regexp.MustCompile("(?ms)^```sh\n(.*?)^```").FindAllStringSubmatch(string(read(t, exportDocumentation)), -1)
	if len(blocks) < 4 {
		t.Errorf("only %d examples", len(blocks))
	}
	for _, block := range blocks {
		cmd := exec.CommandContext(t.Context(), "sh", "-eu", "-c", strings.ReplaceAll(block[1], "10899", port))
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), asProgram+"=1", "PATH="+bin+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s%s", err, block[1], out)
		}
		for _, pid := range workingIn(t, dir) { // who was told to end, or whose last client has left
			awaitEnd(t, pid)
		}
	}
	for _, name := range names(t, dir) {
		switch filepath.Ext(name) {
		case ".qcow2":
			mustImage(t, "check", filepath.Join(dir, name))
		case ".sock", ".pid":
			t.Errorf("%s was left behind", name)
		}
	}
}

// workingIn returns the processes whose working directory is dir.
func workingIn(t *testing.T, dir string) (pids []int) {
	t.Helper()
	for _, name := range names(t, "/proc") {
		if pid, err := strconv.Atoi(name); err == nil {
			if cwd, err := os.Readlink("/proc/" + name + "/cwd"); err == nil && cwd == dir {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// TestExportDocumentationIsComplete: every flag is there, and every option of qemu-nbd that there is here is called the same.
func TestExportDocumentationIsComplete(t *testing.T) {
	text := string(read(t, exportDocumentation))
	newExportCommand().Flags().VisitAll(func(f *pflag.Flag) {
		if !regexp.MustCompile("`--" + f.Name + "[` =]").MatchString(text) {
			t.Errorf("--%s is not described", f.Name)
		}
		if f.Shorthand != "" && !regexp.MustCompile("`-"+f.Shorthand+"[` ]").MatchString(text) {
			t.Errorf("-%s is not described", f.Shorthand)
		}
	})
}

// TestExportIsNamedAsQEMUs: a flag that qemu-nbd has, too, has the same letter and the same name.
func TestExportIsNamedAsQEMUs(t *testing.T) {
	require.Tool(t, "qemu-nbd")
	out, err := exec.CommandContext(t.Context(), "qemu-nbd", "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	missing := map[string]bool{
		"offset": true, "list": true, "object": true, "tls-creds": true, "tls-authz": true, "trace": true, "selinux-label": true,
		"connect": true, "disconnect": true, "snapshot": true, "aio": true, "image-opts": true, "help": true, "version": true, "verbose": true,
	}
	flags := newExportCommand().Flags()
	seen := 0
	for _, m := range regexp.MustCompile(`(?m)^\s+(?:-(\w), +)?--([a-z-]+)`).FindAllStringSubmatch(string(out), -1) {
		letter, name := m[1], m[2]
		f := flags.Lookup(name)
		switch {
		case missing[name]:
			if f := flags.ShorthandLookup(letter); letter != "" && f != nil {
				t.Errorf("-%s is --%s of qemu-nbd, and --%s here", letter, name, f.Name)
			}
		case f == nil:
			t.Errorf("there is no --%s", name)
		case f.Shorthand != letter:
			t.Errorf("--%s is -%s, not -%s", name, letter, f.Shorthand)
		default:
			seen++
		}
	}
	if seen < 18 {
		t.Errorf("only %d flags of qemu-nbd are there", seen)
	}
}

// TestExportUnits has systemd look at the units of the documentation.
func TestExportUnits(t *testing.T) {
	require.Tool(t, "systemd-analyze")
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var units []string
	for _, m := range regexp.MustCompile("(?ms)^```ini\n# /etc/systemd/system/(\\S+)\n(.*?)^```").FindAllStringSubmatch(string(read(t, exportDocumentation)), -1) {
		name := strings.Replace(m[1], "@.", "@disk.", 1)
		units = append(units, write(t, filepath.Join(dir, name), strings.ReplaceAll(m[2], "/usr/local/bin/qcow-csi", executable)))
	}
	if len(units) != 3 {
		t.Fatalf("there are %d units", len(units))
	}
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", append([]string{"verify", "--man=no", "--recursive-errors=one"}, units...)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), dir) {
		t.Errorf("systemd-analyze: %v: %s", err, out)
	}
}
