// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
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
		cmd := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
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
		w.forgetLogs()
		host, port, _ := net.SplitHostPort(address)
		startCaddyfile(t, w.globals()+fmt.Sprintf(`http://:%s {
	bind %s
	async_proxy
}
`, port, host))
		line := w.waitLog(warning, 1)[0]
		if want := fmt.Sprintf("pid %d]", cmd.Process.Pid); line["address"] != address || !strings.HasSuffix(fmt.Sprint(line["processes"]), want) {
			t.Errorf("line %v, want address %s and %s", line, address, want)
		}
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
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
