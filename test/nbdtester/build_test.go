package nbdtester_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// aptConfig keeps apt inside of a directory.
const aptConfig = `
Dir::State::Lists "%[1]s/lists";
Dir::Cache "%[1]s/cache";
Dir::Etc::SourceList "%[1]s/sources.list";
Dir::Etc::SourceParts "-";
Dir::Etc::TrustedParts "/usr/share/keyrings";
APT::Sandbox::User "root";
`

// The suite of the source is fixed: that of the libraries is the machine's own, so that headers and libraries agree.
const aptSources = `
deb http://deb.debian.org/debian %s main
deb-src http://deb.debian.org/debian trixie main
`

// configHeader is what the configure script of nbd would find out, as far as the program wants to know it.
const configHeader = `
#define PACKAGE_VERSION "of Debian"
#define SIZEOF_UNSIGNED_SHORT_INT 2
#define SIZEOF_UNSIGNED_INT 4
#define SIZEOF_UNSIGNED_LONG_INT 8
#define SIZEOF_UNSIGNED_LONG_LONG_INT 8
#define HAVE_FDATASYNC 1
#define HAVE_MKSTEMP 1
#define HAVE_GNUTLS 1
`

// tester is nbd-tester-client, built.
type tester struct{ program, source string }

// buildTester fetches and builds nbd-tester-client. It skips the test where Debian's archive is not to be had.
func buildTester(t *testing.T) *tester {
	t.Helper()
	require.Tool(t, "apt-get", "dpkg-deb", "tar", "gcc")
	dir := t.TempDir()
	release, err := os.ReadFile("/etc/os-release")
	require.Feature(t, err == nil && strings.Contains(string(release), "ID=debian"), "needs a Debian")
	_, codename, _ := strings.Cut(string(release), "VERSION_CODENAME=")
	codename, _, _ = strings.Cut(codename, "\n")
	for name, content := range map[string]string{
		"apt.conf": fmt.Sprintf(aptConfig, dir), "sources.list": fmt.Sprintf(aptSources, codename), "config.h": configHeader,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, part := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, part), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	run := func(name string, args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "APT_CONFIG="+filepath.Join(dir, "apt.conf"))
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for _, args := range [][]string{
		{"apt-get", "update"},
		{"apt-get", "source", "--download-only", "nbd"},
		{"apt-get", "download", "libglib2.0-dev", "libgnutls28-dev"},
	} {
		out, err := run(args[0], args[1:]...)
		require.Feature(t, err == nil, fmt.Sprintf("needs Debian's archive: %q: %v\n%s", args, err, out))
	}
	only := func(pattern string) string {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(found) != 1 {
			t.Fatalf("%s: %q, %v", pattern, found, err)
		}
		return found[0]
	}
	must := func(name string, args ...string) {
		if out, err := run(name, args...); err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
	}
	must("tar", "xf", only("nbd_*.orig.tar.*"))
	must("dpkg-deb", "-x", only("libglib2.0-dev_*.deb"), "headers")
	must("dpkg-deb", "-x", only("libgnutls28-dev_*.deb"), "headers")
	b := &tester{program: filepath.Join(dir, "nbd-tester-client"), source: only("nbd-*")}
	include := []string{"-I" + dir, "-I" + b.source, "-I" + dir + "/headers/usr/include", "-I" + dir + "/headers/usr/include/glib-2.0"}
	include = append(include, "-I"+filepath.Dir(only("headers/usr/lib/*/glib-2.0/include/glibconfig.h")))
	args := append([]string{"-w", "-D_GNU_SOURCE", "-D_FILE_OFFSET_BITS=64", "-o", b.program}, include...)
	for _, file := range []string{"tests/run/nbd-tester-client.c", "cliserv.c", "crypto-gnutls.c", "buffer.c"} {
		args = append(args, filepath.Join(b.source, file))
	}
	must("gcc", append(args, "-l:libglib-2.0.so.0", "-l:libgnutls.so.30")...)
	return b
}
