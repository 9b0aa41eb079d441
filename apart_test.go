// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// apartTests are tests that run in processes of their own, beside those in the main process.
// There is only one Caddy per process, so that tests of one process run one after the other,
// though they mostly wait. The longest come first.
var apartTests = []string{
	"TestBinaryReadme",
	"TestProcessClosesTunnelsOfDeafClients",
	"TestTunnels",
	"TestDocumentedCommands",
	"TestProcessReloadsUnderTraffic",
	"TestTunnelsBehindTheProxyProtocol",
	"TestClientsThatNeverRead",
	"TestAdminAPI",
	"TestHistory",
	"TestTunnelsOutliveCaddysStallLimits",
	"TestCommandStatusOnATerminal",
	"TestParentStreamsIndependent",
	"TestBinaryChurn",
	"TestRulesOfPeers",
	"TestBinaryOverTLS",
	"TestProcessExitsWithStuckTunnels",
	"TestProcessExitsWithLiveTunnels",
	"TestBinaryIdle",
	"TestClientConnReloadUnderTraffic",
	"TestClientConnRequests",
	"TestParentSquid",
	"TestTunnelsOfAServerForHTTP1",
	"TestRefusalsOfEagerClients",
	"TestStreamSteadyReader",
	"TestStreamSteadyOrigin",
	"TestBinaryExit",
	"TestCommandSaysWhoMayUseIt",
	"TestCommandIntroducesItself",
	"TestCommandExplainMistakes",
	"TestCommandExplain",
	"TestCommandRefusals",
	"TestBinaryRules",
	"TestBinaryReload",
	"TestTunnelsOutliveAReload",
	"TestSlowReadersAreNeitherIdleNorStalled",
	"TestTunnelsOfOneConnectionDoNotWaitForEachOther",
	"TestTunnelsLeaveNothingBehind",
	"TestProcessExitsWithClientConns",
	"TestStreamLarge",
	"TestStreamStalledReader",
	"TestStreamSlowRequest",
	"TestCommand",
	"TestUnroutable",
	"TestSpellings",
	"TestOwnAddresses",
	"TestNearbyAddresses",
	"TestRebinding",
	"TestSearchList",
	"TestProcessSplicesOnClientConns",
	"TestProcessWithSilentTarget",
	"TestProcessExitsDuringDials",
	"TestBinaryDescriptors",
	"TestCommandStatusSelects",
	"TestCommandStatus",
	"TestBinaryCommands",
	"TestWarningsAboutDescriptors",
	"TestWarningsAboutEvictions",
	"TestWarningsOfAConfig",
	"TestWarningsOfTheProcess",
	"TestTopTargets",
	"TestLogTable",
}

// The main process starts a second one, the runner, which starts one for each of apartTests.
// The environment tells them their part.
const (
	runnerEnv = "ASYNC_PROXY_TEST_RUNNER" // the directory for the outcomes: this is the runner
	apartEnv  = "ASYNC_PROXY_TEST_APART"  // the first port: this is the process of one test
	caddyEnv  = "ASYNC_PROXY_TEST_CADDY"  // the path at which cmd/caddy is or will be
)

// apartDir is the directory in which the main process finds the outcomes of apartTests. It is
// empty where tests run as usual.
var apartDir string

// apart reports whether the calling test, one of apartTests, is to run here. In the main
// process of a whole run, it takes over the outcome that the test has in its own process, and
// returns false.
func apart(t *testing.T) bool {
	t.Helper()
	if !slices.Contains(apartTests, t.Name()) {
		t.Fatalf("%s is not in the list apartTests", t.Name())
	}
	if apartDir == "" {
		return true
	}
	t.Parallel() // waits until the other tests have run
	var failure []byte
	for {
		var err error
		if failure, err = os.ReadFile(filepath.Join(apartDir, t.Name()+".end")); err == nil {
			break
		} else if !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	output, err := os.ReadFile(filepath.Join(apartDir, t.Name()+".out"))
	switch {
	case err != nil || len(failure) > 0:
		t.Errorf("in a process of its own: %s %v\n%s", failure, err, output)
	case strings.Contains(string(output), "--- SKIP: "+t.Name()+" "):
		t.Skipf("%s", output)
	default:
		t.Logf("%s", output)
	}
	return false
}

// startRunner starts the runner if this process is the main process of a whole run. It returns
// a function that ends it.
func startRunner() (stop func(), err error) {
	whole := os.Getenv(apartEnv) == "" && testing.CoverMode() == ""
	for _, name := range []string{"run", "list", "fuzz", "count", "cpu"} {
		f := flag.Lookup("test." + name)
		whole = whole && f.Value.String() == f.DefValue
	}
	if !whole {
		return func() {}, nil
	}
	if apartDir, err = os.MkdirTemp("", "async-proxy-test"); err != nil {
		return nil, err
	}
	_ = os.Setenv(caddyEnv, filepath.Join(apartDir, "caddy"))
	runner := exec.Command(os.Args[0], flagsForAll()...)
	runner.Env = append(os.Environ(), runnerEnv+"="+apartDir, fmt.Sprintf("%s=%d", apartEnv, nextPort.Load()+2000))
	runner.Stderr = os.Stderr
	alive, err := runner.StdinPipe() // the runner ends with the main process, however that ends
	if err != nil {
		return nil, err
	}
	if err := runner.Start(); err != nil {
		return nil, err
	}
	return func() {
		alive.Close()
		_ = runner.Wait()
	}, nil
}

// flagsForAll returns the flags of this process that matter to every process.
func flagsForAll() (flags []string) {
	flag.Visit(func(f *flag.Flag) {
		if !strings.HasPrefix(f.Name, "test.") || slices.Contains([]string{"test.timeout", "test.skip", "test.short"}, f.Name) {
			flags = append(flags, "-"+f.Name+"="+f.Value.String())
		}
	})
	return flags
}

// runApart is the runner. It builds cmd/caddy and runs apartTests, as many at once as there are
// processors, and stays until the main process has read their outcomes.
func runApart(dir string) {
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	go func() {
		path := os.Getenv(caddyEnv)
		if err := buildCaddy(path + ".new"); err != nil {
			_ = os.WriteFile(path+".failed", []byte(err.Error()), 0o600)
		} else {
			_ = os.Rename(path+".new", path)
		}
	}()
	next := make(chan int)
	var all sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		all.Go(func() {
			for i := range next {
				runAlone(ctx, dir, i)
			}
		})
	}
	for i := range apartTests {
		next <- i
	}
	close(next)
	all.Wait()
	<-ctx.Done()
}

// runAlone runs one of apartTests in a process of its own. It writes the output to a file, and
// then the failure, if any, to another.
func runAlone(ctx context.Context, dir string, i int) {
	path, first := filepath.Join(dir, apartTests[i]), 0
	_, _ = fmt.Sscan(os.Getenv(apartEnv), &first)
	test := exec.CommandContext(ctx, os.Args[0], append(flagsForAll(), "-test.v", "-test.run=^"+apartTests[i]+"$")...)
	test.Env = append(os.Environ(), runnerEnv+"=", fmt.Sprintf("%s=%d", apartEnv, first+100*i))
	output, err := os.Create(path + ".out")
	if err == nil {
		test.Stdout, test.Stderr = output, output
		err = test.Run()
		output.Close()
	}
	text := ""
	if err != nil {
		text = err.Error()
	}
	if os.WriteFile(path+".new", []byte(text), 0o600) == nil {
		_ = os.Rename(path+".new", path+".end")
	}
}
