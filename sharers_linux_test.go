// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"golang.org/x/sys/unix"
)

// sharerAddress is the environment variable that makes this test's process listen at an
// address, as another Caddy would.
const sharerAddress = "ASYNC_PROXY_TEST_SHARER"

// A process that listens at the same address gets some of the connections, which is hard to
// diagnose when its responses differ.
func TestWarnsAboutOtherProcessAtPort(t *testing.T) {
	if address := os.Getenv(sharerAddress); address != "" {
		listenAsAnother(t, address)
		return
	}
	const warning = "another process listens at the same address and gets some of the connections; stop it, or use another port"
	w := newWorld(t, "", nil)
	if lines := w.logLines(warning); len(lines) > 0 {
		t.Errorf("warnings without another process: %v", lines)
	}
	for _, address := range []string{w.proxy, strings.Replace(w.proxy, "127.0.0.1", "[::1]", 1)} {
		sharer, stop := startSharer(t, address)
		w.forgetLogs()
		host, port, _ := net.SplitHostPort(address)
		startCaddyfile(t, w.globals()+fmt.Sprintf(`http://:%s {
	bind %s
	async_proxy
}
`, port, host))
		line := w.waitLog(warning, 1)[0]
		if want := fmt.Sprintf("pid %d]", sharer); line["address"] != address || !strings.HasSuffix(fmt.Sprint(line["processes"]), want) {
			t.Errorf("line %v, want address %s and %s", line, address, want)
		}
		stop()
		// During a reload one process briefly has two sockets.
		w.forgetLogs()
		loadCaddyfile(t, w.globals()+fmt.Sprintf(`http://:%s {
	bind %s
	async_proxy
}
`, port, host))
		w.waitLog("async-proxy listening", 1)
		if lines := w.logLines(warning); len(lines) > 0 {
			t.Errorf("warnings without another process: %v", lines)
		}
	}
}

// startSharer starts a process that listens at an address, and returns its pid. stop ends it.
func startSharer(t *testing.T, address string) (pid int, stop func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run", "^TestWarnsAboutOtherProcessAtPort$")
	cmd.Env = append(os.Environ(), sharerAddress+"="+address)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "listening\n" {
		t.Fatalf("%q, %v", line, err)
	}
	return cmd.Process.Pid, sync.OnceFunc(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
}

// A process that starts later and takes connections is noticed as well, and so is its end. The other
// may listen at a more specific address. One at a less specific address takes none.
func TestNoticesOtherProcessLater(t *testing.T) {
	w := newWorld(t, "", nil)
	everywhere := freeAddress(t)
	_, port, _ := net.SplitHostPort(everywhere)
	w.load(w.site("") + "http://:" + port + " {\n\tbind 0.0.0.0\n\tasync_proxy\n}\n")
	if found := currentSharers(); len(found) > 0 {
		t.Fatalf("found %v without another process", found)
	}
	watch := &currentProcess().sharers
	checkNow := func() {
		watch.mu.Lock()
		defer watch.mu.Unlock()
		watch.timer.Reset(0)
	}
	const warning = "another process listens at the same address and gets some of the connections; stop it, or use another port"
	for _, address := range []string{w.proxy, everywhere} {
		w.forgetLogs()
		pid, stop := startSharer(t, address)
		defer stop()
		checkNow()
		line := w.waitLog(warning, 1)[0]
		if found := currentSharers(); len(found) != 1 || found[0].pid != pid || found[0].at.String() != address ||
			line["address"] != address || fmt.Sprint(line["processes"]) != "["+found[0].String()+"]" {
			t.Errorf("found %v and logged %v, want pid %d at %s", found, line, pid, address)
		}
		watch.onTimer() // says nothing twice
		stop()
		checkNow()
		line = w.waitLog("the other process at this address no longer listens", 1)[0]
		if found := currentSharers(); len(found) > 0 || line["address"] != address {
			t.Errorf("found %v and logged %v after the other process has ended", found, line)
		}
		if lines := w.logLines(warning); len(lines) != 1 {
			t.Errorf("warnings: %v", lines)
		}
	}
	_, port, _ = net.SplitHostPort(w.proxy)
	_, stop := startSharer(t, "0.0.0.0:"+port)
	defer stop()
	watch.onTimer()
	if found := currentSharers(); len(found) > 0 {
		t.Errorf("found %v, which gets none of our connections", found)
	}

	// The checks go on, and they end with the last config that has a proxy.
	watch.mu.Lock()
	if !watch.timer.Stop() {
		t.Error("there is no next check")
	}
	watch.timer.Reset(sharerInterval)
	watch.mu.Unlock()
	w.load("http://" + w.proxy + " {\n\trespond hello\n}\n")
	watch.mu.Lock()
	defer watch.mu.Unlock()
	if watch.timer.Stop() || currentSharers() != nil {
		t.Error("the checks go on without a proxy")
	}
}

// TestLosesConnections checks which sockets of others get connections that are meant for this process.
func TestLosesConnections(t *testing.T) {
	shared := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		return errors.Join(err, failed)
	}}
	for _, tc := range []struct {
		network, at string
		loses       []string
	}{
		{"tcp", "[::]:0", []string{"0.0.0.0", "127.0.0.1", "::", "::1"}},
		{"tcp6", "[::]:0", []string{"::", "::1"}},
		{"tcp4", "0.0.0.0:0", []string{"0.0.0.0", "127.0.0.1"}},
		{"tcp", "127.0.0.1:0", []string{"127.0.0.1"}},
		{"tcp", "[::1]:0", []string{"::1"}},
	} {
		ln, err := shared.Listen(t.Context(), tc.network, tc.at)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		var s sharerSearch
		s.findOurs()
		var loses []string
		for _, addr := range []string{"0.0.0.0", "127.0.0.1", "::", "::1"} {
			at := netip.AddrPortFrom(netip.MustParseAddr(addr), uint16(ln.Addr().(*net.TCPAddr).Port))
			if s.loses(at) {
				loses = append(loses, addr)
			}
		}
		if !slices.Equal(loses, tc.loses) {
			t.Errorf("%s %s: loses to %v, want %v", tc.network, tc.at, loses, tc.loses)
		}
	}
}

// FuzzParseLocal checks that every address that the kernel can print is read.
func FuzzParseLocal(f *testing.F) {
	for _, seed := range []string{"0100007F:1F90", "00000000000000000000000001000000:01BB", "0000000000000000FFFF00000100007F:0050", ":", "7F:1", "00:00000"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, field string) {
		at, ok := parseLocal(field)
		if !ok {
			return
		}
		addr := at.Addr().AsSlice()
		if strings.Index(field, ":") == 32 && at.Addr().Is4() {
			mapped := at.Addr().As16()
			addr = mapped[:]
		}
		for word := range slices.Chunk(addr, 4) {
			binary.NativeEndian.PutUint32(word, binary.BigEndian.Uint32(word))
		}
		if again, ok := parseLocal(fmt.Sprintf("%X:%04X", addr, at.Port())); !ok || again != at {
			t.Errorf("%q is %v, but %v when it is written again", field, at, again)
		}
	})
}

func listenAsAnother(t *testing.T, address string) {
	addr, err := caddy.ParseNetworkAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := addr.Listen(t.Context(), 0, net.ListenConfig{})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.(net.Listener).Close()
	fmt.Println("listening")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// Two listeners of one process share an address if the config names it in two ways. Those of a reload are not
// meant.
func TestWarnsAboutOwnConflicts(t *testing.T) {
	w := newWorld(t, "", nil)
	_, port, _ := net.SplitHostPort(w.proxy)
	site := func(bind string) string {
		return "http://:" + port + " {\n\tbind " + bind + "\n\tasync_proxy {\n\t\tzone " + bind + "\n\t}\n}\n"
	}
	other := freeAddress(t)
	_, otherPort, _ := net.SplitHostPort(other)
	checkNow := func() {
		watch := &currentProcess().sharers
		watch.mu.Lock()
		defer watch.mu.Unlock()
		watch.timer.Reset(0)
	}
	for name, tc := range map[string]struct {
		config   string
		warnings []string
	}{
		"two names":          {w.globals() + site("localhost") + "http://127.0.0.1:" + port + " {\n\tbind 127.0.0.1\n\tasync_proxy\n}\n", []string{"host_in_address", "shared_address"}},
		"the admin endpoint": {strings.Replace(w.globals(), "admin off", "admin localhost:"+port, 1) + site("127.0.0.1"), []string{"shared_address"}},
		"different ports":    {strings.Replace(w.globals(), "admin off", "admin localhost:"+otherPort, 1) + site("127.0.0.1"), nil},
		"everywhere, too":    {w.globals() + site("127.0.0.1") + "http://:" + otherPort + " {\n\tbind 0.0.0.0\n\tasync_proxy\n}\n", nil},
	} {
		t.Run(name, func(t *testing.T) {
			w.forgetLogs()
			startCaddyfile(t, tc.config)
			checkNow()
			if len(tc.warnings) > 0 {
				if line := w.waitLog(ownConflict, 1)[0]; line["address"] != w.proxy {
					t.Errorf("line %v", line)
				}
				checkWarnings(t, name, tc.warnings...)
			} else if currentProcess().sharers.onTimer(); len(w.logLines(ownConflict)) > 0 || len(ownConflicts()) > 0 {
				t.Errorf("a warning: %v", w.logLines(ownConflict))
			}
			// During a reload, there may be two sockets, too.
			w.forgetLogs()
			w.load(w.site(""))
			if found := ownConflicts(); len(found) > 0 {
				t.Errorf("after the conflict: %v", found)
			}
			w.load(w.site("burst 5"))
			if len(w.logLines(ownConflict)) > 0 {
				t.Errorf("a reload warned: %v", w.logLines(ownConflict))
			}
		})
	}
}
