// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
)

// inherited are sockets passed on as by a service manager. Caddy never returns them.
var inherited []*os.File

// TestAccessListenersInherited checks that an inherited socket is closed to clients like
// any other of the proxy's own.
func TestAccessListenersInherited(t *testing.T) {
	ln, err := net.Listen("tcp4", freeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	file, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	inherited = append(inherited, file)
	// Fd makes the socket block, also for those that already accept from it.
	bind := fmt.Sprintf("fd/%d", file.Fd())
	w := newWorld(t, "", nil)
	w.load(w.site("allow 127.0.0.0/8") + "http://a.example {\n\tbind " + bind + "\n\tasync_proxy\n}\n")
	policyOpen(t, w.proxy, http.MethodConnect, ln.Addr().String(), "", "") // another site's socket
	w.load(strings.Replace(w.site("allow 127.0.0.0/8"), "async_proxy", "bind 127.0.0.1 "+bind+"\n\tasync_proxy", 1))
	accessDenied(t, w.proxy, http.MethodConnect, ln.Addr().String(), "")
}
